// Pictures for networks: enlarged and padded crops in, 8-bit pixels out. As runtime/images/canvas.py.
#pragma once

#include "plan.hpp"

namespace tw {

// 8-bit pixels [height, width, channels].
struct Pixels {
    std::int64_t height = 0, width = 0, channels = 0;
    std::vector<std::uint8_t> bytes;
};

// Bicubic enlargement as Pillow does it in 8 bits.
Pixels enlarged(const Pixels& pixels, std::int64_t scale);

// An enlarged and padded picture in colour, computed crop by crop.
struct Enlarged {
    const Pixels& rgb;
    std::int64_t scale, multiple, least;

    std::int64_t height() const;
    std::int64_t width() const;
    // The planes [3, height, width] of a crop, in [0, 1].
    Floats crop(std::int64_t top, std::int64_t left, std::int64_t height, std::int64_t width) const;
};

// Writes planes [3, height, width] at a place: clamped to [0, 1], rounded, cut at the border; NaN becomes 0.
void fill(Pixels& rgb, std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width);

Pixels luma(const Pixels& rgb);

}  // namespace tw
