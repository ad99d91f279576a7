// One pass over the shard: 28 to 30 bytes per parameter, read and written once.
#include "../launch.cuh"
#include "adamw.h"

namespace phi4 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

template <typename Grad>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Phi4AdamW call, AdamWFactors factors, bool wide) {
    // A captured graph replays these arguments; what changes from step to step is then in memory.
    if (call.device_lr != nullptr || call.device_step != nullptr) {
        factors = adamw_factors(call, call.device_lr ? *call.device_lr : call.lr,
                                call.device_step ? *call.device_step : call.step);
    }
    const float grad_scale = call.grad_scale ? *call.grad_scale : 1.0f;
    const int64_t stride = int64_t{gridDim.x} * kThreads * kPack;
    int64_t offset = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPack;
    for (; offset < call.n; offset += stride) {
        adamw_pack<Grad>(call, factors, grad_scale, offset, wide);
    }
}

template <typename Grad>
cudaError_t launch(const Phi4AdamW& call, cudaStream_t stream) {
    unsigned blocks = 0;
    const int64_t items = (call.n + kThreads * kPack - 1) / (kThreads * kPack);
    const cudaError_t error = strided_grid(items, kBlocksPerSm, &blocks);
    if (error != cudaSuccess) return error;
    const AdamWFactors factors = adamw_factors(call, call.lr, call.step);
    adamw_kernel<Grad><<<blocks, kThreads, 0, stream>>>(call, factors, adamw_wide<Grad>(call));
    return cudaGetLastError();
}

}  // namespace
}  // namespace phi4

extern "C" int phi4_adamw(const Phi4AdamW* call, void* stream) {
    if (call->n == 0) return cudaSuccess;
    const auto on = static_cast<cudaStream_t>(stream);
    return call->grad_type == PHI4_BFLOAT16 ? phi4::launch<__nv_bfloat16>(*call, on)
                                            : phi4::launch<float>(*call, on);
}
