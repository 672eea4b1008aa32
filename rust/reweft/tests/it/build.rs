//! Builds archives and pickles that say of themselves what a test likes.

/// An archive of stored records, and where its headers are, so that a test can make one of them lie.
#[derive(Clone)]
pub struct Zip {
    pub bytes: Vec<u8>,
    /// Local header of each record.
    pub local: Vec<usize>,
    /// Directory header of each record.
    pub central: Vec<usize>,
    /// The end record.
    pub end: usize,
}

impl Zip {
    pub fn new(records: &[(&str, &[u8])]) -> Self {
        let records: Vec<_> = records.iter().map(|(name, data)| Record::new(name, data)).collect();
        Self::of(&records)
    }

    pub fn of(records: &[Record]) -> Self {
        let mut zip = Self { bytes: Vec::new(), local: Vec::new(), central: Vec::new(), end: 0 };
        for record in records {
            zip.local.push(zip.bytes.len());
            zip.bytes.extend(b"PK\x03\x04\x14\0");
            zip.bytes.extend(record.fields(&record.local_extra));
            zip.bytes.extend(record.name.as_bytes());
            zip.bytes.extend(&record.local_extra);
            zip.bytes.extend(&record.packed);
            zip.bytes.extend(&record.behind);
        }
        let start = zip.bytes.len();
        for (record, header_offset) in records.iter().zip(zip.local.clone()) {
            zip.central.push(zip.bytes.len());
            zip.bytes.extend(b"PK\x01\x02\x14\0\x14\0");
            zip.bytes.extend(record.fields(&record.extra));
            zip.bytes.extend([0; 10]);
            zip.bytes.extend(u32::try_from(header_offset).unwrap().to_le_bytes());
            zip.bytes.extend(record.name.as_bytes());
            zip.bytes.extend(&record.extra);
        }
        zip.end = zip.bytes.len();
        let count = u16::try_from(records.len()).unwrap_or(u16::MAX);
        zip.bytes.extend(b"PK\x05\x06\0\0\0\0");
        zip.bytes.extend(count.to_le_bytes().repeat(2));
        zip.bytes.extend(u32::try_from(zip.end - start).unwrap().to_le_bytes());
        zip.bytes.extend(u32::try_from(start).unwrap().to_le_bytes());
        zip.bytes.extend([0, 0]);
        zip
    }

    /// Writes `value` over the bytes at `at`.
    pub fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Inserts bytes without any header taking notice.
    pub fn insert(&mut self, at: usize, value: &[u8]) {
        self.bytes.splice(at..at, value.iter().copied());
    }

    /// Puts the 64-bit end record and its locator before the end record, which then points to it.
    pub fn widen_end(&mut self, count: u64) {
        let end = self.end;
        let start = u32::from_le_bytes(self.bytes[end + 16..end + 20].try_into().unwrap());
        let mut wide = b"PK\x06\x06".to_vec();
        wide.extend(44_u64.to_le_bytes());
        wide.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        wide.extend(count.to_le_bytes().repeat(2));
        wide.extend((end as u64 - u64::from(start)).to_le_bytes());
        wide.extend(u64::from(start).to_le_bytes());
        wide.extend(b"PK\x06\x07\0\0\0\0");
        wide.extend((end as u64).to_le_bytes());
        wide.extend(1_u32.to_le_bytes());
        self.put(end + 8, &[0xff; 12]);
        self.insert(end, &wide);
        self.end += wide.len();
    }
}

/// One record; what the headers say of it is computed from the fields.
#[derive(Clone)]
pub struct Record {
    pub name: String,
    pub packed: Vec<u8>,
    pub nbytes: u32,
    pub crc: u32,
    pub method: u16,
    pub flags: u16,
    pub extra: Vec<u8>,
    pub local_extra: Vec<u8>,
    /// Bytes behind the data: a descriptor, or what nobody knows of.
    pub behind: Vec<u8>,
}

impl Record {
    pub fn new(name: &str, data: &[u8]) -> Self {
        Self {
            name: name.to_owned(),
            packed: data.to_vec(),
            nbytes: u32::try_from(data.len()).unwrap(),
            crc: crc32fast::hash(data),
            method: 0,
            flags: 0,
            extra: Vec::new(),
            local_extra: Vec::new(),
            behind: Vec::new(),
        }
    }

    /// Flags to the length of the extra field.
    fn fields(&self, extra: &[u8]) -> Vec<u8> {
        let mut fields = Vec::new();
        fields.extend(self.flags.to_le_bytes());
        fields.extend(self.method.to_le_bytes());
        fields.extend([0; 4]);
        fields.extend(self.crc.to_le_bytes());
        fields.extend(u32::try_from(self.packed.len()).unwrap().to_le_bytes());
        fields.extend(self.nbytes.to_le_bytes());
        fields.extend(u16::try_from(self.name.len()).unwrap().to_le_bytes());
        fields.extend(u16::try_from(extra.len()).unwrap().to_le_bytes());
        fields
    }
}

/// A `.pt` around a pickle, with storages by key.
pub fn pt(pickle: &[u8], storages: &[(&str, &[u8])]) -> Vec<u8> {
    let names: Vec<String> = storages.iter().map(|(key, _)| format!("a/data/{key}")).collect();
    let mut records: Vec<(&str, &[u8])> = vec![("a/data.pkl", pickle), ("a/version", b"3\n")];
    records.extend(names.iter().zip(storages).map(|(name, (_, data))| (name.as_str(), *data)));
    Zip::new(&records).bytes
}

/// A tensor's call in a pickle of protocol 2, as torch writes it, whatever the numbers.
#[derive(Clone)]
pub struct Tensor<'a> {
    pub class: &'a str,
    pub key: &'a str,
    pub numel: i64,
    pub storage_offset: i64,
    pub size: &'a [i64],
    pub stride: &'a [i64],
    /// Opcodes of the hooks, and of arguments behind them.
    pub rest: &'a [u8],
}

/// Opcodes of an empty `OrderedDict`.
pub const NO_HOOKS: &[u8] = b"ccollections\nOrderedDict\n)R";

impl Default for Tensor<'_> {
    fn default() -> Self {
        Self {
            class: "torch\nFloatStorage",
            key: "0",
            numel: 4,
            storage_offset: 0,
            size: &[4],
            stride: &[1],
            rest: NO_HOOKS,
        }
    }
}

impl Tensor<'_> {
    pub fn opcodes(&self) -> Vec<u8> {
        let mut out = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        out.extend([text("storage"), format!("c{}\n", self.class).into_bytes(), text(self.key), text("cpu")].concat());
        out.extend([int(self.numel), b"tQ".to_vec(), int(self.storage_offset)].concat());
        for numbers in [self.size, self.stride] {
            out.push(b'(');
            out.extend(numbers.iter().flat_map(|number| int(*number)));
            out.push(b't');
        }
        out.extend([b"\x89", self.rest, b"tR"].concat());
        out
    }
}

/// Opcodes of a dict with these values, as a whole pickle.
pub fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for (key, opcodes) in items {
        out.extend(text(key));
        out.extend(opcodes);
    }
    out.extend(b"u.");
    out
}

/// Opcodes of a text.
pub fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &u32::try_from(text.len()).unwrap().to_le_bytes(), text.as_bytes()].concat()
}

/// Opcodes of a number of 64 bits.
pub fn int(number: i64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &number.to_le_bytes()].concat()
}
