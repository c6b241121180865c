// Makes kernels callable by XLA.
//
// A kernel is a function such as
//   ffi::Error Kernel(ffi::ThreadPool pool, float epsilon, FL x, ffi::Result<FL> y);
// Numbers are attributes, which are named in the order of the parameters:
//   FD_HANDLER(Name, Kernel, "epsilon");
// Buffers are arguments, results are results, both in the order of the call.
//
// The library's own binding (xla::ffi::Ffi::Bind) does the same with a type for each
// signature. In some files, those types took longer to compile than the kernels.

#ifndef FLAX_DENSENET_CPU_HANDLER_H_
#define FLAX_DENSENET_CPU_HANDLER_H_

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

inline XLA_FFI_Error* make_error(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  return api->XLA_FFI_Error_Create(&args);
}

template <class T>
struct Type {};

// Takes from a call what a kernel asks for, one parameter after the other.
class Call {
 public:
  Call(const XLA_FFI_CallFrame& frame, std::initializer_list<const char*> names)
      : frame_(frame), names_(names) {}

  ffi::ThreadPool take(Type<ffi::ThreadPool>) {
    return *ffi::CtxDecoding<ffi::ThreadPool>::Decode(frame_.api, frame_.ctx, diagnostic_);
  }
  float take(Type<float>) {
    float value;
    take_attribute(XLA_FFI_DataType_F32, sizeof(value), &value);
    return value;
  }
  int64_t take(Type<int64_t>) {
    int64_t value;
    take_attribute(XLA_FFI_DataType_S64, sizeof(value), &value);
    return value;
  }
  template <ffi::DataType dtype, size_t rank>
  ffi::Buffer<dtype, rank> take(Type<ffi::Buffer<dtype, rank>>) {
    return ffi::Buffer<dtype, rank>(take_argument((XLA_FFI_DataType)dtype));
  }
  template <ffi::DataType dtype, size_t rank>
  ffi::Result<ffi::Buffer<dtype, rank>> take(
      Type<ffi::Result<ffi::Buffer<dtype, rank>>>) {
    return ffi::Buffer<dtype, rank>(take_result((XLA_FFI_DataType)dtype));
  }
  ffi::RemainingArgs take(Type<ffi::RemainingArgs>) {
    const int64_t first = arguments_;
    arguments_ = frame_.args.size;
    return ffi::RemainingArgs(&frame_.args, first);
  }
  ffi::RemainingRets take(Type<ffi::RemainingRets>) {
    const int64_t first = results_;
    results_ = frame_.rets.size;
    return ffi::RemainingRets(&frame_.rets, first);
  }

  void check_that_all_is_taken() const {
    check(arguments_ == frame_.args.size, "too many arguments");
    check(results_ == frame_.rets.size, "too many results");
    check(attributes_ == frame_.attrs.size, "unknown attributes");
  }

 private:
  static void check(bool right, const char* what) {
    if (!right) throw std::invalid_argument(what);
  }
  const XLA_FFI_Buffer* take_argument(XLA_FFI_DataType dtype) {
    const int64_t i = arguments_++;
    check(i < frame_.args.size, "too few arguments");
    const auto* buffer = static_cast<const XLA_FFI_Buffer*>(frame_.args.args[i]);
    check(frame_.args.types[i] == XLA_FFI_ArgType_BUFFER && buffer->dtype == dtype,
          "an argument of another type");
    return buffer;
  }
  const XLA_FFI_Buffer* take_result(XLA_FFI_DataType dtype) {
    const int64_t i = results_++;
    check(i < frame_.rets.size, "too few results");
    const auto* buffer = static_cast<const XLA_FFI_Buffer*>(frame_.rets.rets[i]);
    check(frame_.rets.types[i] == XLA_FFI_RetType_BUFFER && buffer->dtype == dtype,
          "a result of another type");
    return buffer;
  }
  void take_attribute(XLA_FFI_DataType dtype, size_t size, void* value) {
    const XLA_FFI_Attrs& all = frame_.attrs;
    check(attributes_ < (int64_t)names_.size(), "a number that FD_HANDLER does not name");
    const std::string_view name = names_.begin()[attributes_++];
    for (int64_t i = 0; i < all.size; ++i) {
      if (std::string_view(all.names[i]->ptr, all.names[i]->len) != name) continue;
      const auto* scalar = static_cast<const XLA_FFI_Scalar*>(all.attrs[i]);
      check(all.types[i] == XLA_FFI_AttrType_SCALAR && scalar->dtype == dtype,
            "an attribute of another type");
      std::memcpy(value, scalar->value, size);
      return;
    }
    check(false, "too few attributes");
  }

  const XLA_FFI_CallFrame& frame_;
  std::initializer_list<const char*> names_;
  int64_t attributes_ = 0, arguments_ = 0, results_ = 0;
  ffi::DiagnosticEngine diagnostic_;
};

// Calls a kernel. Braces evaluate the arguments in their order, parentheses need not.
template <class... Parameters>
struct Run {
  ffi::Error error;
  Run(const Call& call, ffi::Error (*kernel)(Parameters...), Parameters... values)
      : error((call.check_that_all_is_taken(), kernel(values...))) {}
};

template <class... Parameters>
__attribute__((noinline, noclone)) XLA_FFI_Error* call_kernel(
    const XLA_FFI_CallFrame* frame, ffi::Error (*kernel)(Parameters...),
    std::initializer_list<const char*> names) {
  Call call(*frame, names);
  try {
    const Run<Parameters...> run{call, kernel, call.take(Type<Parameters>())...};
    return run.error.success() ? nullptr
                               : make_error(frame->api, run.error.message().c_str());
  } catch (const std::invalid_argument& error) {
    const std::string message = std::string("a CPU kernel was called with ") + error.what();
    return make_error(frame->api, message.c_str());
  }
}

// XLA asks a handler for the version of its interface before it calls it.
inline XLA_FFI_Error* tell_version(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start->type != XLA_FFI_Extension_Metadata)
    return make_error(frame->api, "a CPU kernel was called with an unknown extension");
  const auto* asked = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  XLA_FFI_Metadata& metadata = *asked->metadata;
  metadata.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                          XLA_FFI_API_MINOR};
  metadata.traits = 0;
  metadata.state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
  return nullptr;
}

}  // namespace

#define FD_HANDLER(Name, kernel, ...)                                            \
  extern "C" XLA_FFI_Error* Name(XLA_FFI_CallFrame* frame) {                     \
    if (frame->extension_start) return tell_version(frame);                      \
    return call_kernel(frame, kernel, {__VA_ARGS__});                            \
  }                                                                              \
  static_assert(true, "")

#endif  // FLAX_DENSENET_CPU_HANDLER_H_
