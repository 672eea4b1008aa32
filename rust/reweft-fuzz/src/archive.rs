//! Archives around bytes that the fuzzer chose, so that it need not find out how a zip file is built.

use std::io::Write;

/// Writes stored records as `torch.save(compute_crc32=False)` does: the reader compares no CRC.
pub(crate) fn stored(records: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in records {
        let header_offset = u32::try_from(file.len()).unwrap();
        let nbytes = u32::try_from(data.len()).unwrap();
        // Version, flags, method, time, date, CRC, packed and unpacked size, lengths of name and extra field.
        let mut fields = vec![0_u8; 14];
        fields.extend(nbytes.to_le_bytes().repeat(2));
        fields.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        fields.extend([0, 0]);
        file.extend(b"PK\x03\x04");
        file.extend(&fields);
        file.extend(name.as_bytes());
        file.write_all(data).unwrap();
        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(&fields);
        directory.extend([0; 10]);
        directory.extend(header_offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = u32::try_from(file.len()).unwrap();
    let count = u16::try_from(records.len()).unwrap();
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend(count.to_le_bytes().repeat(2));
    file.extend(u32::try_from(directory.len()).unwrap().to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}
