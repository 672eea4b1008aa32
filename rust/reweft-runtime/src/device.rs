//! Devices as libtorch numbers them. A device is data here: no code asks for one by name.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// One line of the device table.
struct Row {
    kind: i32,
    name: &'static str,
    /// Whether its memory is the process's own, and a call has finished when it returns.
    host: bool,
}

const fn row(kind: i32, name: &'static str) -> Row {
    Row { kind, name, host: false }
}

/// Codes of `c10::DeviceType` with the names torch prints and parses.
const DEVICES: &[Row] = &[
    Row { kind: 0, name: "cpu", host: true },
    row(1, "cuda"),
    row(2, "mkldnn"),
    row(3, "opengl"),
    row(4, "opencl"),
    row(5, "ideep"),
    row(6, "hip"),
    row(7, "fpga"),
    row(8, "maia"),
    row(9, "xla"),
    row(10, "vulkan"),
    row(11, "metal"),
    row(12, "xpu"),
    row(13, "mps"),
    row(14, "meta"),
    row(15, "hpu"),
    row(16, "ve"),
    row(17, "lazy"),
    row(18, "ipu"),
    row(19, "mtia"),
    row(20, "privateuseone"),
];

/// Where a tensor lives: a kind of device and which one of them.
///
/// ```
/// use reweft_runtime::Device;
/// let device: Device = "cuda:1".parse()?;
/// assert_eq!((device.kind, device.index), (1, 1));
/// assert_eq!(Device::CPU.to_string(), "cpu");
/// assert!("cuda:x".parse::<Device>().is_err());
/// # Ok::<(), reweft_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// The `c10::DeviceType` code; unknown codes are kept.
    pub kind: i32,
    /// Which device of that kind; -1 leaves the choice to libtorch.
    pub index: i32,
}

impl Device {
    /// The host.
    pub const CPU: Self = Self { kind: 0, index: -1 };

    /// The name of the kind (`cuda`), or `None` for a code this version does not know.
    pub fn name(self) -> Option<&'static str> {
        self.row().map(|row| row.name)
    }

    /// Whether tensors there are in the memory of this process and calls have finished when they return.
    pub fn is_host(self) -> bool {
        self.row().is_some_and(|row| row.host)
    }

    fn row(self) -> Option<&'static Row> {
        DEVICES.iter().find(|row| row.kind == self.kind)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name)?,
            None => write!(f, "device-type-{}", self.kind)?,
        }
        if self.index >= 0 { write!(f, ":{}", self.index) } else { Ok(()) }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Parses `cpu`, `cuda` or `cuda:0`.
    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::usage(format!("device \"{text}\": want a name such as cpu, cuda or cuda:0"));
        let (name, index) = match text.split_once(':') {
            Some((name, digits)) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                (name, digits.parse().map_err(|_| unknown())?)
            }
            Some(_) => return Err(unknown()),
            None => (text, -1),
        };
        let row = DEVICES.iter().find(|row| row.name == name).ok_or_else(unknown)?;
        Ok(Self { kind: row.kind, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_and_codes_are_used_once() {
        for (position, row) in DEVICES.iter().enumerate() {
            assert_eq!(usize::try_from(row.kind), Ok(position));
            for text in [row.name.to_owned(), format!("{}:3", row.name)] {
                assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
            }
        }
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for text in ["", "cpu:", "cpu:-1", "cpu:+1", "CPU", "cuda:0:0", "cuda:99999999999", "gpu"] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
        assert_eq!(Device { kind: 99, index: 0 }.to_string(), "device-type-99:0");
    }
}
