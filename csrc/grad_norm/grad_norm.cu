// Pass one: a block per chunk of any tensor leaves one double. Pass two: one block adds them.
#include <algorithm>

#include "../launch.cuh"
#include "grad_norm.h"

namespace phi4 {
namespace {

constexpr int kTensorsPerLaunch = 128;  // the table travels as a kernel argument, 4 KiB at most

struct Table {
    const void* tensors[kTensorsPerLaunch];
    int64_t sizes[kTensorsPerLaunch];
    int64_t first_chunk[kTensorsPerLaunch];
    int num_tensors;
};

__device__ double block_sum(double value) {
    __shared__ double lanes[kLanes];
    lanes[threadIdx.x] = value;
    for (int half = kLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    }
    return lanes[0];
}

template <typename T>
__global__ void __launch_bounds__(kLanes)
    square_sum_kernel(const __grid_constant__ Table table, double* partials) {
    const int64_t chunk = blockIdx.x;
    const int index = owner_of(table.first_chunk, table.num_tensors, chunk);
    const int64_t offset = (chunk - table.first_chunk[index]) * kChunk;
    const int64_t count = min(kChunk, table.sizes[index] - offset);
    const T* from = static_cast<const T*>(table.tensors[index]) + offset;
    const double sum = block_sum(lane_sum(from, count, threadIdx.x));
    if (threadIdx.x == 0) partials[chunk] = sum;
}

__global__ void __launch_bounds__(kLanes)
    add_partials_kernel(const double* partials, int64_t count, double* total) {
    const double sum = block_sum(partials_lane_sum(partials, count, threadIdx.x));
    if (threadIdx.x == 0) *total = sum;
}

template <typename T>
cudaError_t launch(const void* const* tensors, const int64_t* sizes, int64_t num_tensors,
                   double* partials, double* total, cudaStream_t stream) {
    int64_t done = 0;
    Table table = {};
    int64_t chunks = 0;
    for (int64_t i = 0; i < num_tensors; ++i) {
        if (sizes[i] > 0) {
            table.tensors[table.num_tensors] = tensors[i];
            table.sizes[table.num_tensors] = sizes[i];
            table.first_chunk[table.num_tensors++] = chunks;
            chunks += num_chunks(sizes[i]);
        }
        const bool last = i + 1 == num_tensors;
        if (chunks > 0 && (last || table.num_tensors == kTensorsPerLaunch)) {
            square_sum_kernel<T><<<chunks, kLanes, 0, stream>>>(table, partials + done);
            if (const cudaError_t error = cudaGetLastError()) return error;
            done += chunks;
            table.num_tensors = 0;
            chunks = 0;
        }
    }
    add_partials_kernel<<<1, kLanes, 0, stream>>>(partials, done, total);
    return cudaGetLastError();
}

}  // namespace
}  // namespace phi4

extern "C" int phi4_square_sum(const void* const* tensors, const int64_t* sizes,
                               int64_t num_tensors, int type, double* partials, double* total,
                               void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    const auto run = type == PHI4_BFLOAT16 ? phi4::launch<__nv_bfloat16> : phi4::launch<float>;
    return run(tensors, sizes, num_tensors, partials, total, on);
}
