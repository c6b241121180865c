// A single call for several devices of this process.
//
// In a program on several CPU devices, each device has a part of the rows, but batch
// statistics and gradients of parameters depend on all rows. The devices are threads that
// share memory, so the last device to make a call computes it for all: it joins the rows,
// calls the handler, and distributes the results. The other threads do not wait; they
// return a future. The results are bit-identical to those of one device with all rows.

#ifndef FLAX_DENSENET_CPU_TOGETHER_H_
#define FLAX_DENSENET_CPU_TOGETHER_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu_handler.h"
#include "cpu_parallel.h"

namespace {

// The devices that make a call. For each of them, in order: the buffers of its arguments
// and then of its results, and the future if it was not the last.
struct Gathering {
  struct Device {
    std::vector<XLA_FFI_Buffer> buffers;
    std::vector<int64_t> dimensions;  // of all buffers
    XLA_FFI_Future* future = nullptr;
    bool here = false;
  };
  std::vector<Device> devices;
  int missing = 0;
};

inline XLA_FFI_Buffer* buffer_of(const XLA_FFI_CallFrame* frame, int64_t i) {
  const int64_t arguments = frame->args.size;
  void* found = i < arguments ? frame->args.args[i] : frame->rets.rets[i - arguments];
  return static_cast<XLA_FFI_Buffer*>(found);
}

// Copies of the buffers of a call, since the originals may be freed after a future is
// returned.
inline void keep_buffers(const XLA_FFI_CallFrame* frame, int64_t count,
                         Gathering::Device& device) {
  for (int64_t i = 0; i < count; ++i) {
    const XLA_FFI_Buffer& b = *buffer_of(frame, i);
    device.buffers.push_back(b);
    device.dimensions.insert(device.dimensions.end(), b.dims, b.dims + b.rank);
  }
  int64_t* dimensions = device.dimensions.data();
  for (XLA_FFI_Buffer& b : device.buffers) b.dims = dimensions, dimensions += b.rank;
}

inline int64_t bytes_of(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_U8: return 1;
    case XLA_FFI_DataType_BF16: return 2;
    default: return 4;
  }
}

// Joins an array that is spread over the devices along one axis.
class Whole {
 public:
  Whole(Gathering& all, int64_t index, int64_t axis) : all_(all), index_(index) {
    const XLA_FFI_Buffer& first = all.devices[0].buffers[index];
    dimensions_.assign(first.dims, first.dims + first.rank);
    dimensions_[axis] *= all.devices.size();
    buffer_ = first;
    buffer_.dims = dimensions_.data();
    inner_ = bytes_of(first.dtype);
    for (int64_t i = 0; i < first.rank; ++i) (i < axis ? outer_ : inner_) *= first.dims[i];
    const size_t size = (size_t)outer_ * inner_ * all.devices.size();
    memory_.reset(std::aligned_alloc(64, (size + 64) / 64 * 64));
    buffer_.data = memory_.get();
  }
  bool has_memory() const { return memory_ != nullptr; }
  XLA_FFI_Buffer* buffer() { return &buffer_; }
  void put_together(ffi::ThreadPool& pool) {
    copy(pool, [](char* whole, char* own, size_t n) { std::memcpy(whole, own, n); });
  }
  void hand_out(ffi::ThreadPool& pool) {
    copy(pool, [](char* whole, char* own, size_t n) { std::memcpy(own, whole, n); });
  }

 private:
  template <class F>
  void copy(ffi::ThreadPool& pool, F f) {
    const int64_t count = (int64_t)all_.devices.size();
    parallel(pool, (int)(outer_ * count), [&](int i) {
      char* whole = static_cast<char*>(buffer_.data) + (size_t)i * inner_;
      void* own = all_.devices[i % count].buffers[index_].data;
      f(whole, static_cast<char*>(own) + (size_t)(i / count) * inner_, (size_t)inner_);
    });
  }
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  Gathering& all_;
  int64_t index_, outer_ = 1, inner_;
  std::vector<int64_t> dimensions_;
  XLA_FFI_Buffer buffer_;
  std::unique_ptr<void, Free> memory_;
};

// The call for all devices. `axes` has, for each buffer, the axis along which it is spread
// over the devices; -1 if each device has the entire buffer.
inline XLA_FFI_Error* call_for_all(XLA_FFI_Handler* handler, XLA_FFI_CallFrame frame,
                                   ffi::ThreadPool& pool, Gathering& all,
                                   const int64_t* axes) {
  const int64_t arguments = frame.args.size, count = arguments + frame.rets.size;
  std::vector<std::optional<Whole>> wholes(count);
  std::vector<void*> buffers(count);
  for (int64_t i = 0; i < count; ++i) {
    buffers[i] = &all.devices[0].buffers[i];
    if (axes[i] < 0) continue;
    wholes[i].emplace(all, i, axes[i]);
    if (!wholes[i]->has_memory())
      return make_error(frame.api, "dense block: out of memory");
    buffers[i] = wholes[i]->buffer();
    if (i < arguments) wholes[i]->put_together(pool);
  }
  frame.args.args = buffers.data();
  frame.rets.rets = buffers.data() + arguments;
  if (XLA_FFI_Error* error = handler(&frame)) return error;
  for (int64_t i = arguments; i < count; ++i) {
    if (wholes[i]) {
      wholes[i]->hand_out(pool);
      continue;
    }
    const XLA_FFI_Buffer& result = all.devices[0].buffers[i];
    size_t size = bytes_of(result.dtype);
    for (int64_t k = 0; k < result.rank; ++k) size *= result.dims[k];
    for (size_t n = 1; n < all.devices.size(); ++n)
      std::memcpy(all.devices[n].buffers[i].data, result.data, size);
  }
  return nullptr;
}

inline void complete(const XLA_FFI_Api* api, XLA_FFI_Future* future, bool failed) {
  if (failed) {
    XLA_FFI_Future_SetError_Args args = {};
    args.struct_size = XLA_FFI_Future_SetError_Args_STRUCT_SIZE;
    args.future = future;
    args.error = make_error(api, "dense block: failed on another device");
    api->XLA_FFI_Future_SetError(&args);
    return;
  }
  XLA_FFI_Future_SetAvailable_Args args = {};
  args.struct_size = XLA_FFI_Future_SetAvailable_Args_STRUCT_SIZE;
  args.future = future;
  api->XLA_FFI_Future_SetAvailable(&args);
}

// The handler that the devices call. It has one more argument, uint32 [2]: a number that
// identifies this call on all devices, and the index of the device. Its attributes are
// `axes` (see above) and `devices` (their number).
inline XLA_FFI_Error* together(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start) return handler(frame);
  XLA_FFI_CallFrame inner = *frame;
  inner.args.size -= 1;
  const int64_t count = inner.args.size + inner.rets.size;
  const int64_t* axes = nullptr;
  int64_t devices = 0;
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> attributes;
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    const std::string_view name(frame->attrs.names[i]->ptr, frame->attrs.names[i]->len);
    if (name == "axes") {
      const auto* array = static_cast<XLA_FFI_Array*>(frame->attrs.attrs[i]);
      if ((int64_t)array->size == count) axes = static_cast<int64_t*>(array->data);
    } else if (name == "devices") {
      const auto* scalar = static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[i]);
      devices = *static_cast<int64_t*>(scalar->value);
    } else {
      types.push_back(frame->attrs.types[i]);
      names.push_back(frame->attrs.names[i]);
      attributes.push_back(frame->attrs.attrs[i]);
    }
  }
  inner.attrs.size = (int64_t)types.size();
  inner.attrs.types = types.data();
  inner.attrs.names = names.data();
  inner.attrs.attrs = attributes.data();
  const auto* who = static_cast<uint32_t*>(buffer_of(frame, inner.args.size)->data);
  const uint32_t number = who[0], place = who[1];
  if (!axes || place >= devices)
    return make_error(frame->api, "dense block: not a call of several devices");

  static std::mutex mutex;
  static std::map<uint32_t, std::shared_ptr<Gathering>> gatherings;
  std::shared_ptr<Gathering> all;
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Gathering>& found = gatherings[number];
    if (!found) {
      found = std::make_shared<Gathering>();
      found->devices.resize(devices);
      found->missing = (int)devices;
    }
    all = found;
    if ((int64_t)all->devices.size() != devices || all->devices[place].here)
      return make_error(frame->api, "dense block: two calls with one number");
    Gathering::Device& own = all->devices[place];
    own.here = true;
    keep_buffers(&inner, count, own);
    if (--all->missing) {
      XLA_FFI_Future_Create_Args args = {};
      args.struct_size = XLA_FFI_Future_Create_Args_STRUCT_SIZE;
      if (XLA_FFI_Error* error = frame->api->XLA_FFI_Future_Create(&args)) return error;
      own.future = frame->future = args.future;
      return nullptr;
    }
    gatherings.erase(number);
  }
  ffi::DiagnosticEngine diagnostic;
  auto pool =
      ffi::CtxDecoding<ffi::ThreadPool>::Decode(frame->api, frame->ctx, diagnostic);
  XLA_FFI_Error* error = call_for_all(handler, inner, *pool, *all, axes);
  // In separate threads, because the rest of a device's program may run there.
  for (Gathering::Device& device : all->devices)
    if (device.future)
      pool->Schedule([api = frame->api, future = device.future, failed = error != nullptr] {
        complete(api, future, failed);
      });
  return error;
}

}  // namespace

// The handler `Name` for several devices, `NameTogether`.
#define FD_TOGETHER(Name)                                                   \
  extern "C" XLA_FFI_Error* Name##Together(XLA_FFI_CallFrame* frame) {      \
    return together(&Name, frame);                                          \
  }                                                                         \
  static_assert(true, "")

#endif  // FLAX_DENSENET_CPU_TOGETHER_H_
