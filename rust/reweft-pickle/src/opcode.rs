//! The one opcode table. The decoder, the interpreter's `match` and the disassembler all come from
//! it.

/// How an opcode's argument is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ArgKind {
    /// No argument.
    Nothing,
    /// Unsigned byte.
    U8,
    /// Unsigned, 2 bytes, little-endian.
    U16,
    /// Unsigned, 4 bytes, little-endian.
    U32,
    /// Signed, 4 bytes, little-endian.
    I32,
    /// Unsigned, 8 bytes, little-endian.
    U64,
    /// IEEE 754 double, big-endian.
    F64,
    /// Text up to a newline.
    Line,
    /// Two texts, each up to a newline.
    TwoLines,
    /// Bytes after a 1-byte length.
    Bytes1,
    /// Bytes after an unsigned 4-byte length.
    Bytes4,
    /// Bytes after a signed 4-byte length, which must not be negative.
    BytesI4,
    /// Bytes after an unsigned 8-byte length.
    Bytes8,
}

/// One row of the table.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub op: Op,
    /// The name in Python's `pickletools`.
    pub name: &'static str,
    pub arg: ArgKind,
    /// The protocol that introduced the opcode.
    pub since: u8,
}

macro_rules! opcodes {
    ($($op:ident $byte:literal $name:literal $arg:ident $since:literal)*) => {
        /// An opcode; the discriminant is its byte.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Op { $($op = $byte),* }

        /// The row for `byte`, if it is an opcode.
        #[inline]
        pub(crate) fn lookup(byte: u8) -> Option<&'static Entry> {
            match byte {
                $($byte => Some(&Entry { op: Op::$op, name: $name, arg: ArgKind::$arg, since: $since }),)*
                _ => None,
            }
        }
    };
}

opcodes! {
    Proto           0x80  "PROTO"            U8       2
    Frame           0x95  "FRAME"            U64      4
    Stop            b'.'  "STOP"             Nothing  0

    None            b'N'  "NONE"             Nothing  0
    NewTrue         0x88  "NEWTRUE"          Nothing  2
    NewFalse        0x89  "NEWFALSE"         Nothing  2
    Int             b'I'  "INT"              Line     0
    BinInt          b'J'  "BININT"           I32      1
    BinInt1         b'K'  "BININT1"          U8       1
    BinInt2         b'M'  "BININT2"          U16      1
    Long            b'L'  "LONG"             Line     0
    Long1           0x8a  "LONG1"            Bytes1   2
    Long4           0x8b  "LONG4"            BytesI4  2
    Float           b'F'  "FLOAT"            Line     0
    BinFloat        b'G'  "BINFLOAT"         F64      1

    String          b'S'  "STRING"           Line     0
    BinString       b'T'  "BINSTRING"        BytesI4  1
    ShortBinString  b'U'  "SHORT_BINSTRING"  Bytes1   1
    Unicode         b'V'  "UNICODE"          Line     0
    BinUnicode      b'X'  "BINUNICODE"       Bytes4   1
    ShortBinUnicode 0x8c  "SHORT_BINUNICODE" Bytes1   4
    BinUnicode8     0x8d  "BINUNICODE8"      Bytes8   4
    BinBytes        b'B'  "BINBYTES"         Bytes4   3
    ShortBinBytes   b'C'  "SHORT_BINBYTES"   Bytes1   3
    BinBytes8       0x8e  "BINBYTES8"        Bytes8   4
    ByteArray8      0x96  "BYTEARRAY8"       Bytes8   5
    NextBuffer      0x97  "NEXT_BUFFER"      Nothing  5
    ReadonlyBuffer  0x98  "READONLY_BUFFER"  Nothing  5

    EmptyTuple      b')'  "EMPTY_TUPLE"      Nothing  1
    Tuple1          0x85  "TUPLE1"           Nothing  2
    Tuple2          0x86  "TUPLE2"           Nothing  2
    Tuple3          0x87  "TUPLE3"           Nothing  2
    Tuple           b't'  "TUPLE"            Nothing  0
    EmptyList       b']'  "EMPTY_LIST"       Nothing  1
    List            b'l'  "LIST"             Nothing  0
    Append          b'a'  "APPEND"           Nothing  0
    Appends         b'e'  "APPENDS"          Nothing  1
    EmptyDict       b'}'  "EMPTY_DICT"       Nothing  1
    Dict            b'd'  "DICT"             Nothing  0
    SetItem         b's'  "SETITEM"          Nothing  0
    SetItems        b'u'  "SETITEMS"         Nothing  1
    EmptySet        0x8f  "EMPTY_SET"        Nothing  4
    AddItems        0x90  "ADDITEMS"         Nothing  4
    FrozenSet       0x91  "FROZENSET"        Nothing  4

    Mark            b'('  "MARK"             Nothing  0
    Pop             b'0'  "POP"              Nothing  0
    PopMark         b'1'  "POP_MARK"         Nothing  1
    Dup             b'2'  "DUP"              Nothing  0
    Get             b'g'  "GET"              Line     0
    BinGet          b'h'  "BINGET"           U8       1
    LongBinGet      b'j'  "LONG_BINGET"      U32      1
    Put             b'p'  "PUT"              Line     0
    BinPut          b'q'  "BINPUT"           U8       1
    LongBinPut      b'r'  "LONG_BINPUT"      U32      1
    Memoize         0x94  "MEMOIZE"          Nothing  4

    Global          b'c'  "GLOBAL"           TwoLines 0
    StackGlobal     0x93  "STACK_GLOBAL"     Nothing  4
    Ext1            0x82  "EXT1"             U8       2
    Ext2            0x83  "EXT2"             U16      2
    Ext4            0x84  "EXT4"             I32      2
    Reduce          b'R'  "REDUCE"           Nothing  0
    NewObj          0x81  "NEWOBJ"           Nothing  2
    NewObjEx        0x92  "NEWOBJ_EX"        Nothing  4
    Inst            b'i'  "INST"             TwoLines 0
    Obj             b'o'  "OBJ"              Nothing  1
    Build           b'b'  "BUILD"            Nothing  0
    PersId          b'P'  "PERSID"           Line     0
    BinPersId       b'Q'  "BINPERSID"        Nothing  1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_found_under_its_own_byte() {
        let rows: Vec<_> = (0..=255).filter_map(|byte| Some((byte, lookup(byte)?))).collect();
        assert_eq!(rows.len(), 68, "pickletools of Python 3.8 and later has 68 opcodes");
        for (byte, entry) in rows {
            assert_eq!(entry.op as u8, byte, "{}", entry.name);
            assert!(entry.since <= 5, "{}", entry.name);
        }
    }
}
