// The same quantisation over host memory, block by block.
#include <algorithm>

#include "fp8_cast.h"

namespace {

struct Range {
    int64_t begin, end;
};

// A rectangle of x that shares a scale: its maximum, then its bytes in one layout or both.
template <typename T, bool kE5M2>
struct Block {
    const Phi4Fp8Cast& call;
    Range rows, columns;

    float at(int64_t row, int64_t column) const {
        return phi4::widened(static_cast<const T*>(call.x)[row * call.columns + column]);
    }
    uint32_t amax_bits() const {
        uint32_t amax = 0;
        for (int64_t r = rows.begin; r < rows.end; ++r)
            for (int64_t c = columns.begin; c < columns.end; ++c)
                amax = std::max(amax, phi4::magnitude_bits(at(r, c)));
        return amax;
    }
    void write(float multiplier, bool rowwise, bool columnwise) const {
        for (int64_t r = rows.begin; r < rows.end; ++r)
            for (int64_t c = columns.begin; c < columns.end; ++c) {
                const uint8_t byte = phi4::quantized<kE5M2>(at(r, c), multiplier);
                if (rowwise) call.rowwise[r * call.columns + c] = byte;
                if (columnwise && call.columnwise) call.columnwise[c * call.rows + r] = byte;
            }
    }
    float write_scaled(bool rowwise, bool columnwise) const {
        const float inverse = phi4::block_inverse<kE5M2>(amax_bits());
        write(1.0f / inverse, rowwise, columnwise);
        return inverse;
    }
};

Range tile(int64_t index, int64_t size) {
    return {index * phi4::kTile, std::min(size, (index + 1) * phi4::kTile)};
}

template <typename T, bool kE5M2>
void run(const Phi4Fp8Cast& call) {
    const Range rows = {0, call.rows}, columns = {0, call.columns};
    const Block<T, kE5M2> all{call, rows, columns};
    *call.amax = phi4::from_bits(all.amax_bits());
    if (call.scaling == PHI4_PER_TENSOR) return all.write(*call.scale, true, true);
    const int64_t down = (call.rows + phi4::kTile - 1) / phi4::kTile;
    const int64_t across = (call.columns + phi4::kTile - 1) / phi4::kTile;
    if (call.scaling == PHI4_PER_TILE) {
        for (int64_t i = 0; i < down * across; ++i) {
            const Range r = tile(i / across, call.rows), c = tile(i % across, call.columns);
            call.inverse[i] = Block<T, kE5M2>{call, r, c}.write_scaled(true, true);
        }
        return;
    }
    for (int64_t i = 0; i < call.rows * across; ++i) {
        const Range r = {i / across, i / across + 1}, c = tile(i % across, call.columns);
        call.inverse[i] = Block<T, kE5M2>{call, r, c}.write_scaled(true, false);
    }
    for (int64_t i = 0; call.columnwise && i < call.columns * down; ++i) {
        const Range r = tile(i % down, call.rows), c = {i / down, i / down + 1};
        call.inverse_columns[i] = Block<T, kE5M2>{call, r, c}.write_scaled(false, true);
    }
}

}  // namespace

extern "C" int phi4_fp8_cast_host(const Phi4Fp8Cast* call) {
    const bool half = call->x_type == PHI4_BFLOAT16;
    if (call->e5m2) {
        half ? run<__nv_bfloat16, true>(*call) : run<float, true>(*call);
    } else {
        half ? run<__nv_bfloat16, false>(*call) : run<float, false>(*call);
    }
    return 0;
}

extern "C" int phi4_fp8_tile_slot(int row, int column) { return phi4::tile_slot(row, column); }
