// Lets a build of PyTorch without CUDA enter device guards of CUDA tensors, which do nothing: code is generated for
// fake tensors, and nothing runs.
#include <c10/core/impl/DeviceGuardImplInterface.h>

static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA,
    new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
