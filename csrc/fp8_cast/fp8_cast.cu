// One read of a 128 x 128 tile gives both layouts. A warp owns a line of 128, a lane four elements
// of it: whole cache lines are written in either direction, and a line's maximum is one reduction.
#include "../launch.cuh"
#include "fp8_cast.h"

namespace phi4 {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowsPerWarp = kTile / kWarps;
constexpr int kGroupsPerWarp = kTile / kPack / kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
__device__ uint32_t pack_amax(const Pack<T>& pack) {
    uint32_t amax = 0;
    for (int i = 0; i < kPack; ++i) amax = max(amax, magnitude_bits(widened(pack.lane[i])));
    return amax;
}

__device__ uint32_t block_amax(uint32_t amax) {
    __shared__ uint32_t of_warp[kWarps];
    of_warp[threadIdx.x / kWarpSize] = __reduce_max_sync(kAllLanes, amax);
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) amax = max(amax, of_warp[i]);
    return amax;
}

// A lane's part of a line; with kPerLine the line's own scale, left at `inverse`.
template <typename T, bool kE5M2, bool kPerLine>
__device__ void write_line(const Pack<T>& pack, float multiplier, float* inverse, uint8_t* to,
                           int64_t count, bool wide) {
    if (kPerLine) {
        const uint32_t amax = __reduce_max_sync(kAllLanes, pack_amax(pack));
        const float own = block_inverse<kE5M2>(amax);
        multiplier = 1.0f / own;
        if (threadIdx.x % kWarpSize == 0 && count > 0) *inverse = own;
    }
    Pack<uint8_t> bytes;
    for (int i = 0; i < kPack; ++i) {
        bytes.lane[i] = quantized<kE5M2>(widened(pack.lane[i]), multiplier);
    }
    store_pack(to, bytes, count, wide);
}

template <typename T, bool kE5M2, int kScaling>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const Phi4Fp8Cast call, bool wide, bool wide_columnwise) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* tile = reinterpret_cast<T*>(memory);
    constexpr bool kPerLine = kScaling == PHI4_PER_LINE;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int64_t across = (call.columns + kTile - 1) / kTile;
    const int64_t down = (call.rows + kTile - 1) / kTile;
    const int64_t tile_row = blockIdx.x / across, tile_column = blockIdx.x % across;
    const int64_t column = tile_column * kTile + lane * kPack;

    Pack<T> packs[kRowsPerWarp];
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
        const int64_t row = tile_row * kTile + i * kWarps + warp;
        const int64_t count = row < call.rows ? call.columns - column : 0;
        const T* from = static_cast<const T*>(call.x) + row * call.columns + column;
        packs[i] = load_pack(from, count, wide);
        amax = max(amax, pack_amax(packs[i]));
    }
    amax = block_amax(amax);
    // Integers: the largest is the same in any order.
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(call.amax), amax);
    float multiplier = kScaling == PHI4_PER_TENSOR ? *call.scale : 1.0f;
    if (kScaling == PHI4_PER_TILE) {
        const float inverse = block_inverse<kE5M2>(amax);
        multiplier = 1.0f / inverse;
        if (threadIdx.x == 0) call.inverse[tile_row * across + tile_column] = inverse;
    }
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
        const int tile_line = i * kWarps + warp;
        const int64_t row = tile_row * kTile + tile_line;
        const int64_t count = row < call.rows ? call.columns - column : 0;
        write_line<T, kE5M2, kPerLine>(packs[i], multiplier,
                                       call.inverse + row * across + tile_column,
                                       call.rowwise + row * call.columns + column, count, wide);
        *reinterpret_cast<Pack<T>*>(tile + tile_slot(tile_line, lane * kPack)) = packs[i];
    }
    if (call.columnwise == nullptr) return;

    __syncthreads();
    const int64_t row = tile_row * kTile + lane * kPack;
    for (int group = warp * kGroupsPerWarp; group < (warp + 1) * kGroupsPerWarp; ++group) {
        Pack<T> block[kPack];
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            block[i] = load_whole(tile + tile_slot(lane * kPack + i, group * kPack));
        }
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
            const int64_t line = tile_column * kTile + group * kPack + i;
            const int64_t count = line < call.columns ? call.rows - row : 0;
            const Pack<T> pack = {block[0].lane[i], block[1].lane[i], block[2].lane[i],
                                  block[3].lane[i]};
            write_line<T, kE5M2, kPerLine>(
                pack, multiplier, call.inverse_columns + line * down + tile_row,
                call.columnwise + line * call.rows + row, count, wide_columnwise);
        }
    }
}

template <typename T, bool kE5M2, int kScaling>
cudaError_t launch(const Phi4Fp8Cast& call, cudaStream_t stream) {
    constexpr int kShared = kTile * kTile * sizeof(T);
    const auto kernel = cast_kernel<T, kE5M2, kScaling>;
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared))
        return error;
    const int64_t tiles = ((call.rows + kTile - 1) / kTile) * ((call.columns + kTile - 1) / kTile);
    const bool wide = call.columns % kPack == 0 && pack_aligned(static_cast<const T*>(call.x)) &&
                      pack_aligned(call.rowwise);
    const bool wide_columnwise = call.rows % kPack == 0 && pack_aligned(call.columnwise);
    kernel<<<tiles, kThreads, kShared, stream>>>(call, wide, wide_columnwise);
    return cudaGetLastError();
}

template <typename T, bool kE5M2>
cudaError_t launch_scaling(const Phi4Fp8Cast& call, cudaStream_t stream) {
    if (call.scaling == PHI4_PER_TENSOR) return launch<T, kE5M2, PHI4_PER_TENSOR>(call, stream);
    if (call.scaling == PHI4_PER_LINE) return launch<T, kE5M2, PHI4_PER_LINE>(call, stream);
    return launch<T, kE5M2, PHI4_PER_TILE>(call, stream);
}

template <typename T>
cudaError_t launch_format(const Phi4Fp8Cast& call, cudaStream_t stream) {
    return call.e5m2 ? launch_scaling<T, true>(call, stream)
                     : launch_scaling<T, false>(call, stream);
}

}  // namespace
}  // namespace phi4

extern "C" int phi4_fp8_cast(const Phi4Fp8Cast* call, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (const cudaError_t error = cudaMemsetAsync(call->amax, 0, sizeof(float), on)) return error;
    if (call->rows == 0 || call->columns == 0) return cudaSuccess;
    return call->x_type == PHI4_BFLOAT16 ? phi4::launch_format<__nv_bfloat16>(*call, on)
                                         : phi4::launch_format<float>(*call, on);
}
