// The handlers of RDNet's layers and transitions in one precision.

#ifndef FLAX_DENSENET_CPU_RDNET_HANDLERS_H_
#define FLAX_DENSENET_CPU_RDNET_HANDLERS_H_

#include "cpu_rdnet_layer.h"
#include "cpu_rdnet_transition.h"
#include "cpu_together.h"

// The handlers of one precision, and those for several devices.
#define FLAX_DENSENET_RDNET(E, Suffix)                                                    \
  FD_HANDLER(RDNetPack##Suffix, Pack<E>);                                                 \
  FD_HANDLER(RDNetLayerForward##Suffix, LayerForward<E>, "epsilon");                      \
  FD_HANDLER(RDNetLayerBackward##Suffix, LayerBackward<E>);                               \
  FD_HANDLER(RDNetTransitionForward##Suffix, TransitionForward<E>, "epsilon", "size");    \
  FD_HANDLER(RDNetTransitionBackward##Suffix, TransitionBackward<E>, "epsilon", "size");  \
  FD_TOGETHER(RDNetLayerBackward##Suffix);                                                \
  FD_TOGETHER(RDNetTransitionBackward##Suffix)

#endif  // FLAX_DENSENET_CPU_RDNET_HANDLERS_H_
