#include "images.hpp"

#include <algorithm>
#include <cmath>

namespace tw {
namespace {

constexpr std::int64_t REACH = 3;  // source pixels on each side that an enlarged pixel depends on; the filter reads 2
constexpr int BITS = 22;           // of a coefficient behind the point, as in Pillow

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

struct Taps {
    std::int64_t first;
    std::vector<std::int32_t> weights;
};

std::vector<Taps> taps(std::int64_t from, std::int64_t to) {
    double scale = static_cast<double>(from) / static_cast<double>(to), support = 2.0;
    std::vector<Taps> all;
    for (std::int64_t i = 0; i < to; ++i) {
        double center = (static_cast<double>(i) + 0.5) * scale, sum = 0.0;
        auto first = std::max<std::int64_t>(0, static_cast<std::int64_t>(center - support + 0.5));
        auto last = std::min(from, static_cast<std::int64_t>(center + support + 0.5));
        std::vector<double> weights;
        for (std::int64_t x = first; x < last; ++x) sum += weights.emplace_back(bicubic(static_cast<double>(x) - center + 0.5));
        Taps& tap = all.emplace_back(Taps{first, {}});
        for (double weight : weights) {
            double scaled = (sum != 0.0 ? weight / sum : weight) * (1 << BITS);
            tap.weights.push_back(static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
        }
    }
    return all;
}

std::uint8_t clip(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> BITS, 0, 255)); }

// For each place of an axis of the padded picture its place in the enlarged one: mirrored, or the edge again.
Shape places(std::int64_t start, std::int64_t count, std::int64_t filled, std::int64_t padded) {
    Shape out(count);
    bool mirrors = padded - filled <= filled - 1;
    for (std::int64_t i = 0; i < count; ++i) {
        std::int64_t at = start + i;
        out[i] = at < filled ? at : mirrors ? 2 * (filled - 1) - at : filled - 1;
    }
    return out;
}

std::int64_t padded(std::int64_t side, std::int64_t multiple, std::int64_t least) {
    return (std::max(side, least) + multiple - 1) / multiple * multiple;
}

}  // namespace

Pixels enlarged(const Pixels& in, std::int64_t scale) {
    auto across = taps(in.width, in.width * scale), down = taps(in.height, in.height * scale);
    std::int64_t channels = in.channels, wide = in.width * scale;
    Pixels middle{in.height, wide, channels, std::vector<std::uint8_t>(in.height * wide * channels)};
    for (std::int64_t y = 0; y < in.height; ++y)
        for (std::int64_t x = 0; x < wide; ++x)
            for (std::int64_t c = 0; c < channels; ++c) {
                std::int32_t sum = 1 << (BITS - 1);
                const std::uint8_t* from = &in.bytes[(y * in.width + across[x].first) * channels + c];
                for (auto weight : across[x].weights) sum += weight * *from, from += channels;
                middle.bytes[(y * wide + x) * channels + c] = clip(sum);
            }
    Pixels out{in.height * scale, wide, channels, std::vector<std::uint8_t>(in.height * scale * wide * channels)};
    std::int64_t row = wide * channels;
    std::vector<std::int32_t> sums(row);
    for (std::int64_t y = 0; y < out.height; ++y) {
        std::fill(sums.begin(), sums.end(), 1 << (BITS - 1));
        const std::uint8_t* from = &middle.bytes[down[y].first * row];
        for (auto weight : down[y].weights) {
            for (std::int64_t i = 0; i < row; ++i) sums[i] += weight * from[i];
            from += row;
        }
        for (std::int64_t i = 0; i < row; ++i) out.bytes[y * row + i] = clip(sums[i]);
    }
    return out;
}

std::int64_t Enlarged::height() const { return padded(rgb.height * scale, multiple, least); }
std::int64_t Enlarged::width() const { return padded(rgb.width * scale, multiple, least); }

Floats Enlarged::crop(std::int64_t top, std::int64_t left, std::int64_t rows, std::int64_t columns) const {
    Shape ys = places(top, rows, rgb.height * scale, height()), xs = places(left, columns, rgb.width * scale, width());
    auto [y0, y1] = std::minmax_element(ys.begin(), ys.end());
    auto [x0, x1] = std::minmax_element(xs.begin(), xs.end());
    // the source pixels that the filter reads; at the border of the picture it reads fewer
    std::int64_t first_row = std::max<std::int64_t>(0, *y0 / scale - REACH), first_column = std::max<std::int64_t>(0, *x0 / scale - REACH);
    Pixels block{std::min(rgb.height, *y1 / scale + 1 + REACH) - first_row, std::min(rgb.width, *x1 / scale + 1 + REACH) - first_column, 3, {}};
    for (std::int64_t y = first_row; y < first_row + block.height; ++y) {
        auto from = rgb.bytes.begin() + (y * rgb.width + first_column) * 3;
        block.bytes.insert(block.bytes.end(), from, from + block.width * 3);
    }
    if (scale != 1) block = enlarged(block, scale);
    Floats planes(3 * rows * columns);
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = 0; y < rows; ++y) {
            const std::uint8_t* row = &block.bytes[(ys[y] - first_row * scale) * block.width * 3];
            float* out = &planes[(c * rows + y) * columns];
            for (std::int64_t x = 0; x < columns; ++x) out[x] = static_cast<float>(row[(xs[x] - first_column * scale) * 3 + c]) / 255.0F;
        }
    return planes;
}

void fill(Pixels& rgb, std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width) {
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = 0; y < std::min(height, rgb.height - top); ++y)
            for (std::int64_t x = 0; x < std::min(width, rgb.width - left); ++x) {
                float value = std::min(std::fmax(planes[(c * height + y) * width + x], 0.0F), 1.0F);
                rgb.bytes[((top + y) * rgb.width + left + x) * 3 + c] = static_cast<std::uint8_t>(value * 255.0F + 0.5F);
            }
}

Pixels luma(const Pixels& rgb) {
    Pixels grey{rgb.height, rgb.width, 1, std::vector<std::uint8_t>(rgb.height * rgb.width)};
    for (std::size_t i = 0; i < grey.bytes.size(); ++i) {
        const std::uint8_t* p = &rgb.bytes[3 * i];
        grey.bytes[i] = static_cast<std::uint8_t>((p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16);
    }
    return grey;
}

}  // namespace tw
