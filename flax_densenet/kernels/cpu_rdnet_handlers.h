// The handlers of RDNet's layers and transitions in one precision.

#ifndef FLAX_DENSENET_CPU_RDNET_HANDLERS_H_
#define FLAX_DENSENET_CPU_RDNET_HANDLERS_H_

#include "cpu_rdnet_layer.h"
#include "cpu_rdnet_transition.h"
#include "cpu_together.h"

// The handlers of one precision, and those for several devices.
#define FLAX_DENSENET_RDNET(E, Suffix)                                                    \
  using FD_T = ffi::Buffer<E::TYPE>;                                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(RDNetPack##Suffix, Pack<E>,                               \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<FL>()         \
                                    .Ret<FD_T>());                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetLayerForward##Suffix, LayerForward<E>,                                         \
      (bind<Results, FD_T, FD_T, FL, FD_T>(                                               \
          bind<Arguments, FD_T, FL, FL, FL, FL, FD_T, FL, FD_T, FL>(bind_pool()))));      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetLayerBackward##Suffix, LayerBackward<E>,                                       \
      (bind<Results, FD_T, FD_T, FL, FL, FL, FL, FL, FL, FL, FL>(                         \
          bind<Arguments, FD_T, FD_T, FL, FD_T, FD_T, FL, FL, FL, FL, FL, FL>(            \
              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()))));                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetTransitionForward##Suffix, TransitionForward<E>,                               \
      (bind<Results, FD_T>(bind<Arguments, FD_T, FL, FL, FD_T, FL>(                       \
          bind_pool().Attr<int64_t>("size")))));                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                          \
      RDNetTransitionBackward##Suffix, TransitionBackward<E>,                             \
      (bind<Results, FD_T, FL, FL, FL, FL>(bind<Arguments, FD_T, FD_T, FL, FL, FL>(       \
          bind_pool().Attr<int64_t>("size")))));                                          \
  FD_TOGETHER(RDNetLayerBackward##Suffix);                                                \
  FD_TOGETHER(RDNetTransitionBackward##Suffix)

#endif  // FLAX_DENSENET_CPU_RDNET_HANDLERS_H_
