// How launchers size a grid, on whatever device is current, and how a block finds its tensor.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace phi4 {

// Blocks for `items` blocks' worth of work in a grid-stride loop: at most what stays resident,
// since a second wave would be a part of one.
template <typename Kernel>
cudaError_t strided_grid(Kernel kernel, int threads, int64_t items, unsigned* blocks) {
    int device = 0, num_sms = 0, per_sm = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
    *blocks = static_cast<unsigned>(std::min<int64_t>(items, int64_t{num_sms} * per_sm));
    return error;
}

// The last of `count` tensors that starts at or before a chunk.
__device__ inline int owner_of(const int64_t* first_chunk, int count, int64_t chunk) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first_chunk[middle] <= chunk) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

}  // namespace phi4
