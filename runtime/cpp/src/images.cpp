#include "images.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

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

double cubic(double x) {
    x = std::fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
}

// Enlarges along an axis: `lines` groups of `count` runs of `run` numbers. Each number has the same operations wherever a crop
// begins.
Floats bicubic(const Floats& source, std::int64_t scale, std::int64_t lines, std::int64_t count, std::int64_t run) {
    Floats result(source.size() * static_cast<std::size_t>(scale));
    Floats total(run);
    for (std::int64_t phase = 0; phase < scale; ++phase)
        for (std::int64_t line = 0; line < lines; ++line)
            for (std::int64_t i = 0; i < count; ++i) {
                std::fill(total.begin(), total.end(), 0.0F);
                float weights = 0.0F;
                for (std::int64_t shift = -2; shift <= 2; ++shift) {
                    auto weight = static_cast<float>(cubic(static_cast<double>(shift) + 0.5 - (static_cast<double>(phase) + 0.5) / static_cast<double>(scale)));
                    if (weight == 0.0F || i + shift < 0 || i + shift >= count) continue;  // the filter is cut at the border
                    const float* from = &source[(line * count + i + shift) * run];
                    for (std::int64_t k = 0; k < run; ++k) {
                        float product = weight * from[k];
                        total[k] += product;
                    }
                    weights += weight;
                }
                float* to = &result[((line * count + i) * scale + phase) * run];
                for (std::int64_t k = 0; k < run; ++k) to[k] = total[k] / weights;
            }
    return result;
}

template <class Number>
void fill_with(std::vector<Number>& pixels, const Pixels& rgb, std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width) {
    constexpr auto most = static_cast<float>(std::numeric_limits<Number>::max());
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = 0; y < std::min(height, rgb.height - top); ++y)
            for (std::int64_t x = 0; x < std::min(width, rgb.width - left); ++x) {
                float value = std::min(std::fmax(planes[(c * height + y) * width + x], 0.0F), 1.0F);
                float level = value * most;
                pixels[((top + y) * rgb.width + left + x) * 3 + c] = static_cast<Number>(level + 0.5F);
            }
}

template <class Number>
std::vector<Number> grey_of(const std::vector<Number>& rgb) {
    std::vector<Number> grey(rgb.size() / 3);
    for (std::size_t i = 0; i < grey.size(); ++i)
        grey[i] = static_cast<Number>((rgb[3 * i] * 19595U + rgb[3 * i + 1] * 38470U + rgb[3 * i + 2] * 7471U + 0x8000U) >> 16);
    return grey;
}

template <class Number>
void append_rows(std::vector<Number>& to, const std::vector<Number>& from, const Pixels& rgb, std::int64_t top, std::int64_t left, std::int64_t height,
                 std::int64_t width) {
    to.reserve(height * width * 3);
    for (std::int64_t y = top; y < top + height; ++y) {
        auto row = from.begin() + (y * rgb.width + left) * 3;
        to.insert(to.end(), row, row + width * 3);
    }
}

}  // namespace

Floats enlarged_levels(const Pixels& in, std::int64_t scale) {
    Floats levels(in.words.size());
    for (std::size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(in.words[i]) / 65535.0F;
    if (scale == 1) return levels;
    levels = bicubic(levels, scale, in.height, in.width, in.channels);
    levels = bicubic(levels, scale, 1, in.height, in.width * scale * in.channels);
    for (float& level : levels) level = std::min(std::max(level, 0.0F), 1.0F);
    return levels;
}

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
    append_rows(block.bytes, rgb.bytes, rgb, first_row, first_column, rgb.bits() == 8 ? block.height : 0, block.width);
    append_rows(block.words, rgb.words, rgb, first_row, first_column, rgb.bits() == 8 ? 0 : block.height, block.width);
    Floats levels;
    if (rgb.bits() == 16) {
        levels = enlarged_levels(block, scale);
    } else if (scale != 1) {
        block = enlarged(block, scale);
    }
    std::int64_t stride = rgb.bits() == 16 ? block.width * scale * 3 : block.width * 3;
    static const std::array<float, 256> LEVELS = [] {
        std::array<float, 256> levels{};
        for (std::size_t i = 0; i < 256; ++i) levels[i] = static_cast<float>(i) / 255.0F;
        return levels;
    }();
    Floats planes(3 * rows * columns);
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = 0; y < rows; ++y) {
            std::int64_t row = (ys[y] - first_row * scale) * stride + c;
            float* out = &planes[(c * rows + y) * columns];
            for (std::int64_t x = 0; x < columns; ++x) {
                std::int64_t at = row + (xs[x] - first_column * scale) * 3;
                out[x] = levels.empty() ? LEVELS[block.bytes[at]] : levels[at];
            }
        }
    return planes;
}

void fill(Pixels& rgb, std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width) {
    if (rgb.bits() == 8) {
        fill_with(rgb.bytes, rgb, top, left, planes, height, width);
    } else {
        fill_with(rgb.words, rgb, top, left, planes, height, width);
    }
}

Pixels luma(const Pixels& rgb) { return {rgb.height, rgb.width, 1, grey_of(rgb.bytes), grey_of(rgb.words)}; }

}  // namespace tw
