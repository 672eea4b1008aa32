//! Opens, reads and converts checkpoints with reweft and with the crates that do the like, in one process.
//!
//! `peers open SMALL.pt SMALL.safetensors ROUNDS` and `peers read LARGE.pt ROUNDS` print the seconds of every round as
//! JSON, by subject; the rounds go through the subjects in turn. `peers convert IN.pt OUT.safetensors` converts once
//! with pytorch-reader and the safetensors crate, tensor by tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use pytorch_reader::PytorchReader;
use reweft::source::{self, Access};
use reweft::{Checkpoint, OpenOptions};
use safetensors::SafeTensors;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["open", pt, safetensors, rounds] => open(pt.as_ref(), safetensors.as_ref(), rounds.parse()?),
        ["read", pt, rounds] => read(pt.as_ref(), rounds.parse()?),
        ["convert", from, to] => convert(from.as_ref(), to.as_ref()),
        _ => Err("usage: open PT SAFETENSORS ROUNDS | read PT ROUNDS | convert PT SAFETENSORS".into()),
    }
}

/// Something to time under a name; gives a number, so that no work can be left out.
type Job<'a> = (&'a str, Box<dyn Fn() -> Result<usize> + 'a>);

fn print_seconds(rounds: usize, jobs: &[Job<'_>]) -> Result<()> {
    let mut seconds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..rounds {
        for (name, job) in jobs {
            let start = Instant::now();
            std::hint::black_box(job()?);
            seconds.entry(name).or_default().push(start.elapsed().as_secs_f64());
        }
    }
    println!("{}", serde_json::to_string(&seconds)?);
    Ok(())
}

/// From a path to all keys with their dtypes and shapes, dropped again.
fn open(pt: &Path, safetensors: &Path, rounds: usize) -> Result<()> {
    let jobs: [Job<'_>; 4] = [
        ("reweft", Box::new(|| Ok(Checkpoint::open(pt, &OpenOptions::default())?.tensors().count()))),
        ("pytorch-reader", Box::new(|| Ok(PytorchReader::new(pt).map_err(text)?.tensors().len()))),
        ("candle-core", Box::new(|| Ok(candle_core::pickle::PthTensors::new(pt, None)?.tensor_infos().len()))),
        ("safetensors", Box::new(|| open_safetensors(safetensors))),
    ];
    print_seconds(rounds, &jobs)
}

/// As the crate's documentation opens a file: mapped.
fn open_safetensors(path: &Path) -> Result<usize> {
    let source = source::open(path, Access::Map)?;
    Ok(SafeTensors::deserialize(source.as_slice().unwrap_or_default())?.len())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Opens the file and reads every tensor.
fn read(pt: &Path, rounds: usize) -> Result<()> {
    let jobs: [Job<'_>; 6] = [
        ("reweft, 1 thread", Box::new(|| read_reweft(pt, 1))),
        ("pytorch-reader, 1 thread", Box::new(|| read_pytorch_reader(pt, 1))),
        ("pread, 1 thread", Box::new(|| read_plain(pt, 1))),
        ("reweft, 2 threads", Box::new(|| read_reweft(pt, 2))),
        ("pytorch-reader, 2 threads", Box::new(|| read_pytorch_reader(pt, 2))),
        ("pread, 2 threads", Box::new(|| read_plain(pt, 2))),
    ];
    print_seconds(rounds, &jobs)
}

/// Runs `work` in each of `threads` threads and adds up what they give.
fn in_threads(threads: usize, work: impl Fn(usize) -> Result<usize> + Sync) -> Result<usize> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn({
                    let work = &work;
                    move || work(thread)
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).sum()
    })
}

/// Into one buffer for each thread, which is used again for every tensor; CRCs are compared.
fn read_reweft(pt: &Path, threads: usize) -> Result<usize> {
    let checkpoint = Checkpoint::open(pt, &OpenOptions::default())?;
    let tensors: Vec<_> = checkpoint.tensors().collect();
    in_threads(threads, |thread| {
        let (mut buffer, mut nbytes) = (Vec::new(), 0);
        for (key, info) in tensors.iter().skip(thread).step_by(threads) {
            buffer.resize(usize::try_from(info.nbytes())?, 0);
            checkpoint.read_into(key, &info.strides, &mut buffer)?;
            nbytes += buffer.len();
        }
        Ok(nbytes)
    })
}

/// The crate gives a new buffer for each tensor.
fn read_pytorch_reader(pt: &Path, threads: usize) -> Result<usize> {
    let reader = PytorchReader::new(pt).map_err(text)?;
    let tensors: Vec<_> = reader.tensors().values().collect();
    in_threads(threads, |thread| {
        tensors.iter().skip(thread).step_by(threads).try_fold(0, |nbytes, tensor| Ok(nbytes + tensor.read()?.len()))
    })
}

/// The whole file, in pieces of the size of the tensors, into one buffer for each thread.
fn read_plain(pt: &Path, threads: usize) -> Result<usize> {
    let file = File::open(pt)?;
    let (length, piece) = (file.metadata()?.len(), 5 << 20_u64);
    in_threads(threads, |thread| {
        let (mut buffer, mut nbytes) = (vec![0; 5 << 20], 0);
        for number in (thread as u64..length.div_ceil(piece)).step_by(threads) {
            let at = number * piece;
            let wanted = &mut buffer[..usize::try_from(piece.min(length - at))?];
            file.read_exact_at(wanted, at)?;
            nbytes += wanted.len();
        }
        Ok(nbytes)
    })
}

/// A tensor of pytorch-reader as the safetensors crate wants it: bytes are read when they are written.
struct Lazy<'a>(&'a pytorch_reader::Tensor, safetensors::Dtype);

impl safetensors::View for Lazy<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.1
    }

    fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.0.read().expect("bytes of the tensor").into()
    }

    fn data_len(&self) -> usize {
        self.0.byte_len()
    }
}

fn convert(from: &Path, to: &Path) -> Result<()> {
    let reader = PytorchReader::new(from).map_err(text)?;
    let tensors = reader.tensors().iter().map(|(name, tensor)| (name, Lazy(tensor, safetensors::Dtype::F32)));
    Ok(safetensors::serialize_to_file(tensors, None, to)?)
}
