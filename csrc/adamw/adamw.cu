// One pass over all shards: 28 to 31 bytes per parameter, read and written once.
#include "../launch.cuh"
#include "adamw.h"

namespace phi4 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAdamWChunk = 4096;
constexpr int kShardsPerLaunch = 40;
constexpr unsigned kAllLanes = 0xffffffffu;

struct ShardTable {
    Phi4AdamWShard shards[kShardsPerLaunch];
    int64_t first_chunk[kShardsPerLaunch];
    int64_t num_chunks;
    int num_shards;
};

// Kernel arguments end at 4 KiB.
static_assert(sizeof(ShardTable) + sizeof(Phi4AdamWStep) + sizeof(AdamWFactors) <= 4096);

// A maximum of integers is the same in any order. Most warps find theirs beaten and write nothing.
__device__ void raise_amax(float* to, uint32_t amax) {
    auto* bits = reinterpret_cast<unsigned*>(to);
    amax = __reduce_max_sync(kAllLanes, amax);
    if (threadIdx.x % 32 == 0 && amax > *reinterpret_cast<volatile unsigned*>(bits))
        atomicMax(bits, amax);
}

template <typename Grad, bool kFp8>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ ShardTable table, const Phi4AdamWStep call,
                 AdamWFactors factors) {
    if (call.found_inf != nullptr && *call.found_inf != 0.0f) return;
    // A captured graph replays these arguments; what changes from step to step is then in memory.
    if (call.device_lr != nullptr || call.device_step != nullptr) {
        factors = adamw_factors(call, call.device_lr ? *call.device_lr : call.lr,
                                call.device_step ? *call.device_step : call.step);
    }
    const float grad_scale = call.grad_scale ? *call.grad_scale : 1.0f;
    for (int64_t chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
        const int index = owner_of(table.first_chunk, table.num_shards, chunk);
        const Phi4AdamWShard& shard = table.shards[index];
        const bool wide = adamw_wide<Grad>(shard);
        const int64_t begin = (chunk - table.first_chunk[index]) * kAdamWChunk;
        const int64_t end = min(begin + kAdamWChunk, shard.n);
        uint32_t amax = 0;
        for (int64_t at = begin + threadIdx.x * kPack; at < end; at += kThreads * kPack)
            amax = max(amax, adamw_pack<Grad, kFp8>(shard, factors, grad_scale, at, wide));
        if (kFp8) raise_amax(shard.fp8_amax, amax);
    }
}

template <typename Grad>
cudaError_t launch_table(const ShardTable& table, const Phi4AdamWStep& call, cudaStream_t stream) {
    const bool fp8 = table.shards[0].fp8 != nullptr;
    const auto kernel = fp8 ? adamw_kernel<Grad, true> : adamw_kernel<Grad, false>;
    unsigned blocks = 0;
    if (const cudaError_t error = strided_grid(kernel, kThreads, table.num_chunks, &blocks))
        return error;
    const AdamWFactors factors = adamw_factors(call, call.lr, call.step);
    kernel<<<blocks, kThreads, 0, stream>>>(table, call, factors);
    return cudaGetLastError();
}

template <typename Grad>
cudaError_t launch(const Phi4AdamWShard* shards, int64_t num_shards, const Phi4AdamWStep& call,
                   cudaStream_t stream) {
    ShardTable table = {};
    for (int64_t i = 0; i < num_shards; ++i) {
        if (shards[i].n > 0) {
            table.shards[table.num_shards] = shards[i];
            table.first_chunk[table.num_shards++] = table.num_chunks;
            table.num_chunks += (shards[i].n + kAdamWChunk - 1) / kAdamWChunk;
        }
        const bool last = i + 1 == num_shards;
        if (table.num_shards > 0 && (last || table.num_shards == kShardsPerLaunch)) {
            if (const cudaError_t error = launch_table<Grad>(table, call, stream)) return error;
            table.num_shards = 0;
            table.num_chunks = 0;
        }
    }
    return cudaSuccess;
}

}  // namespace
}  // namespace phi4

extern "C" int phi4_adamw(const Phi4AdamWShard* shards, int64_t num_shards,
                          const Phi4AdamWStep* step, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    return step->grad_type == PHI4_BFLOAT16
               ? phi4::launch<__nv_bfloat16>(shards, num_shards, *step, on)
               : phi4::launch<float>(shards, num_shards, *step, on);
}
