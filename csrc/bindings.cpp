// samv2._rle: the codec as plain functions. Work runs without the GIL, on immutable
// bytes objects and on buffers that stay pinned for the length of the call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cfenv>
#include <memory>
#include <string>
#include <vector>

#include "rle.h"
#include "top_k.h"

namespace py = pybind11;

namespace {

using rle::u32;
using rle::u64;
using rle::u8;

// Without the GIL, and with the arithmetic that the format asks for: threads may be set to
// flush denormals (torch.set_flush_denormal) or to round in other ways.
class Unlocked {
 public:
  Unlocked() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~Unlocked() { std::fesetenv(&callers_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  py::gil_scoped_release release_;
  std::fenv_t callers_;
};

rle::Dtype dtype_of(int code) {
  if (code < 0 || code > 2)
    throw py::value_error("dtype code is " + std::to_string(code) + ", known are 0, 1, 2");
  return static_cast<rle::Dtype>(code);
}

// A pinned, contiguous, one-dimensional view of `numel` items.
py::buffer_info pinned(const py::handle& object, u64 numel, u64 itemsize, bool writable) {
  py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(writable);
  const bool fits = info.ndim == 1 && static_cast<u64>(info.itemsize) == itemsize &&
                    static_cast<u64>(info.size) == numel &&
                    (numel < 2 || info.strides[0] == info.itemsize);
  if (!fits || info.format.size() != 1)
    throw py::type_error("a buffer has " + std::to_string(info.size) + " items of " +
                         std::to_string(info.itemsize) + " bytes, format '" + info.format +
                         "'; it must be contiguous, 1-D, with " + std::to_string(numel) +
                         " native items of " + std::to_string(itemsize) + " bytes");
  return info;
}

void expect_format(const py::buffer_info& info, char wanted) {
  if (info.format[0] != wanted)
    throw py::type_error("a buffer has format '" + info.format + "', it must be '" + wanted +
                         "'");
}

void check_log2(const char* name, int value, int least, int most) {
  if (value < least || value > most)
    throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", allowed are " +
                          std::to_string(least) + " to " + std::to_string(most));
}

struct Packing {
  rle::PackOptions options;
  std::vector<py::buffer_info> pins;
  std::vector<rle::SourceTensor> sources;
};

Packing packing(const py::list& tensors, int codec, int block_log2, int quant_log2,
                const py::object& seed, u64 round, u64 fingerprint, bool error_feedback) {
  check_log2("block_log2", block_log2, rle::kMinBlockLog2, rle::kMaxBlockLog2);
  Packing packing;
  rle::PackOptions& options = packing.options;
  if (codec < 0 || codec > 5)
    throw py::value_error("codec is " + std::to_string(codec) + ", supported are 0 to 5");
  options.codec = static_cast<rle::Codec>(codec);
  if (rle::is_quantised(options.codec))
    check_log2("quant_log2", quant_log2, rle::kMinQuantLog2, rle::kMaxQuantLog2);
  options.block_log2 = block_log2;
  options.quant_log2 = quant_log2;
  options.stochastic = !seed.is_none();
  options.seed = options.stochastic ? seed.cast<u64>() : 0;
  options.round = round;
  options.fingerprint = fingerprint;
  options.error_feedback = error_feedback;
  for (const py::handle& item : tensors) {
    const auto row = item.cast<py::tuple>();
    const u32 id = row[0].cast<u32>();
    if (!packing.sources.empty() && id <= packing.sources.back().id)
      throw py::value_error("tensor ids must increase strictly");
    const rle::Dtype dtype = dtype_of(row[1].cast<int>());
    const u64 numel = row[2].cast<u64>();
    const bool wide = dtype == rle::Dtype::f32;
    packing.pins.push_back(pinned(row[3], numel, rle::dtype_bytes(dtype), false));
    expect_format(packing.pins.back(), wide ? 'i' : 'h');
    packing.sources.push_back({id, dtype, numel, packing.pins.back().ptr});
  }
  return packing;
}

// Large fresh memory is mostly page faults; huge pages make them few.
void prefer_huge_pages(u8* bytes, u64 size) {
#if defined(MADV_HUGEPAGE)
  constexpr u64 kHuge = u64{2} << 20;
  const u64 head = (0 - reinterpret_cast<std::uintptr_t>(bytes)) & (kHuge - 1);
  if (size < head + kHuge) return;
  madvise(bytes + head, (size - head) & ~(kHuge - 1), MADV_HUGEPAGE);
#else
  (void)bytes, (void)size;
#endif
}

// `out` is None, or a writable buffer of bytes: then the frame's length is returned, and
// nothing is written if it does not fit.
py::object encode(const py::list& tensors, int codec, int block_log2, int quant_log2,
                  const py::object& seed, u64 round, u64 fingerprint, bool error_feedback,
                  const py::object& out) {
  const Packing job =
      packing(tensors, codec, block_log2, quant_log2, seed, round, fingerprint, error_feedback);
  std::unique_ptr<rle::FrameWriter> writer;
  {
    const Unlocked unlocked;
    writer = std::make_unique<rle::FrameWriter>(job.sources, job.options);
  }
  const u64 size = writer->size();
  if (!out.is_none()) {
    const py::buffer_info target = py::reinterpret_borrow<py::buffer>(out).request(true);
    if (target.ndim != 1 || target.itemsize != 1 || target.strides[0] != 1)
      throw py::type_error("`out` must be a contiguous, 1-D buffer of bytes");
    if (static_cast<u64>(target.size) >= size) {
      const Unlocked unlocked;
      writer->write(static_cast<u8*>(target.ptr));
    }
    return py::int_(size);
  }
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (raw == nullptr) throw py::error_already_set();
  auto frame = py::reinterpret_steal<py::bytes>(raw);
  u8* bytes = reinterpret_cast<u8*>(PyBytes_AS_STRING(raw));
  {
    const Unlocked unlocked;
    prefer_huge_pages(bytes, size);
    writer->write(bytes);
  }
  return frame;
}

const u8* data_of(const py::bytes& frame) {
  return reinterpret_cast<const u8*>(PyBytes_AS_STRING(frame.ptr()));
}

u64 size_of(const py::bytes& frame) { return static_cast<u64>(PyBytes_GET_SIZE(frame.ptr())); }

rle::Expectation expectation(const py::list& manifest, u64 fingerprint, u64 round) {
  rle::Expectation expected{{}, fingerprint, round};
  for (const py::handle& item : manifest) {
    const auto row = item.cast<py::tuple>();
    expected.rows.push_back(
        {row[0].cast<u32>(), dtype_of(row[1].cast<int>()), row[2].cast<u64>()});
  }
  return expected;
}

// The whole frame is checked before the first byte of any output changes.
rle::Frame check(const py::bytes& bytes, const rle::Expectation& expected, bool allow_nonfinite,
                 rle::Workspace& work) {
  const u8* data = data_of(bytes);
  const u64 size = size_of(bytes);
  const Unlocked unlocked;
  rle::Frame frame = rle::parse(data, size, &expected);
  for (const rle::Entry& entry : frame.entries)
    rle::validate(frame, entry, allow_nonfinite, work);
  return frame;
}

// An array whose first element stands on a cache line, so that it can be streamed to.
py::array aligned_array(rle::Dtype dtype, u64 numel) {
  const u64 width = rle::dtype_bytes(dtype);
  const auto room = static_cast<py::ssize_t>(numel * width + 64);
  const py::array_t<u8> memory(room);
  const u64 skip = (0 - reinterpret_cast<std::uintptr_t>(memory.data())) & 63;
  const u8* first = memory.data() + skip;
  const auto count = static_cast<py::ssize_t>(numel);
  if (width == 4)
    return py::array_t<std::int32_t>(count, reinterpret_cast<const std::int32_t*>(first), memory);
  return py::array_t<std::int16_t>(count, reinterpret_cast<const std::int16_t*>(first), memory);
}

py::list decode(const py::bytes& bytes, const py::list& manifest, u64 fingerprint, u64 round,
                bool allow_nonfinite) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const auto work = rle::make_workspace();
  const rle::Frame frame = check(bytes, expected, allow_nonfinite, *work);
  py::list result;
  std::vector<void*> outputs;
  for (const rle::Entry& entry : frame.entries) {
    py::array array = aligned_array(entry.dtype, entry.numel);
    outputs.push_back(array.mutable_data());
    result.append(py::make_tuple(entry.id, array));
  }
  {
    const Unlocked unlocked;
    for (std::size_t i = 0; i < outputs.size(); ++i)
      rle::decode(frame, frame.entries[i], outputs[i], *work);
  }
  return result;
}

// Decodes into `outputs`, {id: buffer of the source dtype's bits}, checking on the way.
// Returns (ids in the frame, ids that `outputs` lacks); if there are any of the second,
// nothing was written.
py::tuple decode_into(const py::bytes& bytes, const py::list& manifest, u64 fingerprint,
                      u64 round, bool allow_nonfinite, const py::dict& outputs) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const u8* data = data_of(bytes);
  const u64 size = size_of(bytes);
  const rle::Frame frame = [&] {
    const Unlocked unlocked;
    return rle::parse(data, size, &expected, rle::BodyHash::later);
  }();
  std::vector<py::buffer_info> pins;
  std::vector<void*> pointers;
  py::list ids;
  py::list missing;
  for (const rle::Entry& entry : frame.entries) {
    const py::int_ id(entry.id);
    ids.append(id);
    if (!outputs.contains(id)) {
      missing.append(id);
      continue;
    }
    pins.push_back(pinned(outputs[id], entry.numel, rle::dtype_bytes(entry.dtype), true));
    expect_format(pins.back(), entry.dtype == rle::Dtype::f32 ? 'i' : 'h');
    pointers.push_back(pins.back().ptr);
  }
  if (missing.empty()) {
    const auto work = rle::make_workspace();
    const Unlocked unlocked;
    rle::check_and_decode(frame, allow_nonfinite, pointers, *work);
  }
  return py::make_tuple(ids, missing);
}

// `frames` are (bytes, weight); `accumulators` maps ids to float32 buffers; ids in `skip`
// are left out. Returns the ids that a frame carries and `accumulators` lacks; if there
// are any, nothing was added.
py::list accumulate(const py::list& frames, const py::list& manifest, u64 fingerprint,
                    u64 round, bool allow_nonfinite, const py::dict& accumulators,
                    const py::set& skip) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const auto work = rle::make_workspace();
  std::vector<rle::Frame> parsed;
  std::vector<float> weights;
  for (const py::handle& item : frames) {
    const auto row = item.cast<py::tuple>();
    parsed.push_back(check(row[0].cast<py::bytes>(), expected, allow_nonfinite, *work));
    weights.push_back(row[1].cast<float>());
  }
  std::vector<std::vector<rle::Addend>> addends(expected.rows.size());
  for (std::size_t f = 0; f < parsed.size(); ++f)
    for (const rle::Entry& entry : parsed[f].entries)
      addends[entry.manifest_row].push_back({&parsed[f], &entry, weights[f]});

  std::vector<py::buffer_info> pins;
  std::vector<std::size_t> rows;
  py::list missing;
  for (std::size_t row = 0; row < addends.size(); ++row) {
    const py::int_ id(expected.rows[row].id);
    if (addends[row].empty() || skip.contains(id)) continue;
    if (!accumulators.contains(id)) {
      missing.append(id);
      continue;
    }
    pins.push_back(pinned(accumulators[id], expected.rows[row].numel, 4, true));
    expect_format(pins.back(), 'f');
    rows.push_back(row);
  }
  if (!missing.empty()) return missing;
  {
    const Unlocked unlocked;
    for (std::size_t i = 0; i < rows.size(); ++i)
      rle::accumulate(addends[rows[i]], static_cast<float*>(pins[i].ptr), *work);
  }
  return missing;
}

// {id: sum of squares} of the values a frame carries.
py::dict squared_norms(const py::bytes& bytes, const py::list& manifest, u64 fingerprint,
                       u64 round, bool allow_nonfinite) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const auto work = rle::make_workspace();
  const rle::Frame frame = check(bytes, expected, allow_nonfinite, *work);
  std::vector<double> sums;
  {
    const Unlocked unlocked;
    for (const rle::Entry& entry : frame.entries)
      sums.push_back(rle::squared_norm(frame, entry, *work));
  }
  py::dict norms;
  for (std::size_t i = 0; i < sums.size(); ++i)
    norms[py::int_(frame.entries[i].id)] = sums[i];
  return norms;
}

// Float32 bit buffers for a selection among all their values together.
struct Pieces {
  std::vector<py::buffer_info> pins;
  std::vector<rle::Piece> pieces;
  u64 total = 0;
};

Pieces pinned_pieces(const py::list& buffers, bool writable) {
  Pieces found;
  for (const py::handle& buffer : buffers) {
    const u64 numel = static_cast<u64>(py::len(buffer));
    found.pins.push_back(pinned(buffer, numel, 4, writable));
    expect_format(found.pins.back(), 'i');
    found.pieces.push_back({static_cast<const u32*>(found.pins.back().ptr), numel});
    found.total += numel;
  }
  return found;
}

// The magnitude bits of the k-th largest value of all float32 bit buffers together.
u32 kth_magnitude(const py::list& sources, u64 k) {
  const Pieces from = pinned_pieces(sources, false);
  if (k < 1 || k > from.total || from.total > 0xFFFFFFFFu)
    throw py::value_error("there is no value number " + std::to_string(k) + " among " +
                          std::to_string(from.total));
  const Unlocked unlocked;
  return rle::kth_magnitude(from.pieces, k).bits;
}

// Zeroes all but the `keep` largest magnitudes of all float32 bit buffers together, ties
// by order: each of `sources` into the one of `outputs` at its place.
void keep_largest(const py::list& sources, u64 keep, const py::list& outputs) {
  const Pieces from = pinned_pieces(sources, false);
  Pieces to = pinned_pieces(outputs, true);
  bool match = from.pieces.size() == to.pieces.size();
  for (std::size_t i = 0; match && i < from.pieces.size(); ++i)
    match = from.pieces[i].count == to.pieces[i].count;
  if (!match) throw py::value_error("one output of its length for each source");
  if (keep > from.total || from.total > 0xFFFFFFFFu)
    throw py::value_error("cannot keep " + std::to_string(keep) + " of " +
                          std::to_string(from.total) + " values");
  const Unlocked unlocked;
  rle::Threshold threshold{0xFFFFFFFFu, 0};
  if (keep > 0) threshold = rle::kth_magnitude(from.pieces, keep);
  for (std::size_t i = 0; i < from.pieces.size(); ++i)
    rle::keep_largest(from.pieces[i], threshold.bits, threshold.ties,
                      static_cast<u32*>(to.pins[i].ptr));
}

// (minor, flags, fingerprint, round, [(id, dtype, codec, block_log2, quant_log2, numel,
// stored, index bytes, value bytes, scale bytes, body bytes, modes), ...])
py::tuple inspect(const py::bytes& bytes) {
  const rle::Frame frame = [&] {
    const u8* data = data_of(bytes);
    const u64 size = size_of(bytes);
    const Unlocked unlocked;
    return rle::parse(data, size, nullptr);
  }();
  py::list rows;
  for (const rle::Entry& e : frame.entries) {
    py::tuple modes(rle::kModes);
    for (int m = 0; m < rle::kModes; ++m) modes[m] = e.modes[m];
    rows.append(py::make_tuple(
        e.id, static_cast<int>(e.dtype), static_cast<int>(e.codec), e.block_log2, e.quant_log2,
        e.numel, e.stored, e.index_bytes, rle::value_plane_bytes(e.stored, e.codec, e.dtype),
        rle::scale_plane_bytes(e.stored, e.codec, e.quant_log2), e.body_bytes, modes));
  }
  return py::make_tuple(static_cast<int>(frame.minor), static_cast<int>(frame.flags),
                        frame.fingerprint, frame.round, rows);
}

u64 xxh3_64(const py::bytes& bytes) { return rle::xxh3(data_of(bytes), size_of(bytes)); }

void raise_frame_error(const rle::Refused& refused) {
  const py::object type = py::module_::import("samv2.common.errors").attr("FrameError");
  const py::object error = type(refused.reason, refused.what());
  PyErr_SetObject(type.ptr(), error.ptr());
}

}  // namespace

PYBIND11_MODULE(_rle, module) {
  module.doc() = "Packing codec of SAM-v2; use samv2.updates.packing instead.";
  module.attr("isa") = rle::isa().name;
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const rle::Refused& refused) {
      raise_frame_error(refused);
    }
  });
  module.def("encode", &encode, py::arg("tensors"), py::kw_only(), py::arg("codec"),
             py::arg("block_log2"), py::arg("quant_log2"), py::arg("seed"), py::arg("round"),
             py::arg("fingerprint"), py::arg("error_feedback"), py::arg("out"));
  module.def("decode", &decode, py::arg("frame"), py::arg("manifest"), py::kw_only(),
             py::arg("fingerprint"), py::arg("round"), py::arg("allow_nonfinite"));
  module.def("decode_into", &decode_into, py::arg("frame"), py::arg("manifest"), py::kw_only(),
             py::arg("fingerprint"), py::arg("round"), py::arg("allow_nonfinite"),
             py::arg("outputs"));
  module.def("accumulate", &accumulate, py::arg("frames"), py::arg("manifest"), py::kw_only(),
             py::arg("fingerprint"), py::arg("round"), py::arg("allow_nonfinite"),
             py::arg("accumulators"), py::arg("skip"));
  module.def("squared_norms", &squared_norms, py::arg("frame"), py::arg("manifest"),
             py::kw_only(), py::arg("fingerprint"), py::arg("round"),
             py::arg("allow_nonfinite"));
  module.def("kth_magnitude", &kth_magnitude, py::arg("sources"), py::arg("k"));
  module.def("keep_largest", &keep_largest, py::arg("sources"), py::arg("keep"),
             py::arg("outputs"));
  module.def("inspect", &inspect, py::arg("frame"));
  module.def("xxh3_64", &xxh3_64, py::arg("data"));
}
