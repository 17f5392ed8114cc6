// Pictures for networks: enlarged and padded crops in, pixels of 8 or 16 bits out. As runtime/images/canvas.py.
#pragma once

#include "plan.hpp"

namespace tw {

// Pixels [height, width, channels] of 8 bits, or of 16 bits: then `words` has them.
struct Pixels {
    std::int64_t height = 0, width = 0, channels = 0;
    std::vector<std::uint8_t> bytes;
    std::vector<std::uint16_t> words{};

    int bits() const { return words.empty() ? 8 : 16; }
};

// Bicubic enlargement as Pillow does it in 8 bits.
Pixels enlarged(const Pixels& pixels, std::int64_t scale);
// The same filter in float32, of pixels with 16 bits: numbers from 0 to 1.
Floats enlarged_levels(const Pixels& pixels, std::int64_t scale);

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

Pixels luma(const Pixels& rgb);  // as Pillow, also of 16 bits

}  // namespace tw
