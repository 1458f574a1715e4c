// samv2._rle: the codec as plain functions. Work runs without the GIL, on immutable
// bytes objects and on buffers that stay pinned for the length of the call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "rle.h"

namespace py = pybind11;

namespace {

using rle::u32;
using rle::u64;
using rle::u8;

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

py::bytes encode(const py::list& tensors, int codec, int block_log2, int quant_log2,
                 const py::object& seed, u64 round, u64 fingerprint, bool error_feedback) {
  check_log2("block_log2", block_log2, rle::kMinBlockLog2, rle::kMaxBlockLog2);
  rle::PackOptions options;
  options.codec = static_cast<rle::Codec>(codec);
  if (codec < 0 || codec > 5 || options.codec == rle::Codec::nf4)
    throw py::value_error("codec is " + std::to_string(codec) + ", supported are 0, 1, 2, 3, 5");
  if (rle::is_quantised(options.codec))
    check_log2("quant_log2", quant_log2, rle::kMinQuantLog2, rle::kMaxQuantLog2);
  options.block_log2 = block_log2;
  options.quant_log2 = quant_log2;
  options.stochastic = !seed.is_none();
  options.seed = options.stochastic ? seed.cast<u64>() : 0;
  options.round = round;
  options.fingerprint = fingerprint;
  options.error_feedback = error_feedback;

  std::vector<py::buffer_info> pins;
  std::vector<rle::SourceTensor> sources;
  for (const py::handle& item : tensors) {
    const auto row = item.cast<py::tuple>();
    const u32 id = row[0].cast<u32>();
    if (!sources.empty() && id <= sources.back().id)
      throw py::value_error("tensor ids must increase strictly");
    const rle::Dtype dtype = dtype_of(row[1].cast<int>());
    const u64 numel = row[2].cast<u64>();
    const bool wide = dtype == rle::Dtype::f32;
    pins.push_back(pinned(row[3], numel, rle::dtype_bytes(dtype), false));
    expect_format(pins.back(), wide ? 'i' : 'h');
    sources.push_back({id, dtype, numel, pins.back().ptr});
  }

  std::vector<rle::FrameWriter> writer;
  {
    py::gil_scoped_release release;
    writer.emplace_back(sources, options);
  }
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(writer[0].size()));
  if (raw == nullptr) throw py::error_already_set();
  auto frame = py::reinterpret_steal<py::bytes>(raw);
  u8* out = reinterpret_cast<u8*>(PyBytes_AS_STRING(raw));
  {
    py::gil_scoped_release release;
    writer[0].write(out);
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

struct Checked {
  rle::Frame frame;
  std::vector<rle::Masks> masks;
};

// The whole frame is checked before the first byte of any output changes.
Checked check(const py::bytes& bytes, const rle::Expectation& expected, bool allow_nonfinite) {
  const u8* data = data_of(bytes);
  const u64 size = size_of(bytes);
  py::gil_scoped_release release;
  Checked checked{rle::parse(data, size, &expected), {}};
  for (const rle::Entry& entry : checked.frame.entries)
    checked.masks.push_back(rle::validate(checked.frame, entry, allow_nonfinite));
  return checked;
}

py::list decode(const py::bytes& bytes, const py::list& manifest, u64 fingerprint, u64 round,
                bool allow_nonfinite) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const Checked checked = check(bytes, expected, allow_nonfinite);
  py::list result;
  std::vector<void*> outputs;
  for (const rle::Entry& entry : checked.frame.entries) {
    const auto count = static_cast<py::ssize_t>(entry.numel);
    py::array array = entry.dtype == rle::Dtype::f32
                          ? py::array(py::array_t<std::int32_t>(count))
                          : py::array(py::array_t<std::int16_t>(count));
    outputs.push_back(array.mutable_data());
    result.append(py::make_tuple(entry.id, array));
  }
  {
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < outputs.size(); ++i)
      rle::decode(checked.frame, checked.frame.entries[i], checked.masks[i], outputs[i]);
  }
  return result;
}

// `accumulators` maps ids to float32 buffers; ids in `skip` are left out. Returns the ids
// that the frame carries and `accumulators` lacks; if there are any, nothing was added.
py::list accumulate(const py::bytes& bytes, const py::list& manifest, u64 fingerprint, u64 round,
                    bool allow_nonfinite, float weight, const py::dict& accumulators,
                    const py::set& skip) {
  const rle::Expectation expected = expectation(manifest, fingerprint, round);
  const Checked checked = check(bytes, expected, allow_nonfinite);
  std::vector<py::buffer_info> pins;
  std::vector<std::size_t> chosen;
  py::list missing;
  for (std::size_t i = 0; i < checked.frame.entries.size(); ++i) {
    const rle::Entry& entry = checked.frame.entries[i];
    const py::int_ id(entry.id);
    if (skip.contains(id)) continue;
    if (!accumulators.contains(id)) {
      missing.append(id);
      continue;
    }
    pins.push_back(pinned(accumulators[id], entry.numel, 4, true));
    expect_format(pins.back(), 'f');
    chosen.push_back(i);
  }
  if (!missing.empty()) return missing;
  {
    py::gil_scoped_release release;
    for (std::size_t i = 0; i < chosen.size(); ++i)
      rle::accumulate(checked.frame, checked.frame.entries[chosen[i]],
                      checked.masks[chosen[i]], weight, static_cast<float*>(pins[i].ptr));
  }
  return missing;
}

// (minor, flags, fingerprint, round, [(id, dtype, codec, block_log2, quant_log2, numel,
// stored, index bytes, value bytes, scale bytes, body bytes, modes), ...])
py::tuple inspect(const py::bytes& bytes) {
  const rle::Frame frame = [&] {
    const u8* data = data_of(bytes);
    const u64 size = size_of(bytes);
    py::gil_scoped_release release;
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
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const rle::Refused& refused) {
      raise_frame_error(refused);
    }
  });
  module.def("encode", &encode, py::arg("tensors"), py::kw_only(), py::arg("codec"),
             py::arg("block_log2"), py::arg("quant_log2"), py::arg("seed"), py::arg("round"),
             py::arg("fingerprint"), py::arg("error_feedback"));
  module.def("decode", &decode, py::arg("frame"), py::arg("manifest"), py::kw_only(),
             py::arg("fingerprint"), py::arg("round"), py::arg("allow_nonfinite"));
  module.def("accumulate", &accumulate, py::arg("frame"), py::arg("manifest"), py::kw_only(),
             py::arg("fingerprint"), py::arg("round"), py::arg("allow_nonfinite"),
             py::arg("weight"), py::arg("accumulators"), py::arg("skip"));
  module.def("inspect", &inspect, py::arg("frame"));
  module.def("xxh3_64", &xxh3_64, py::arg("data"));
}
