#include "color.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace tw {

const Strings COLORS = {"off", "wavelet", "adain"};

namespace {

constexpr int BLURS = 5;                               // each twice as wide as the one before
constexpr std::int64_t BLUR_REACH = (1 << BLURS) - 1;  // pixels on each side that a recoloured pixel depends on
constexpr std::int64_t SIDE = 512;                     // of the rectangles that are computed at once
constexpr double LEAST_VARIANCE = 1e-5;                // added to variances of values from 0 to 1

struct Rectangle {
    std::int64_t top, left, bottom, right;

    std::int64_t height() const { return bottom - top; }
    std::int64_t width() const { return right - left; }
};

std::vector<Rectangle> blocks(const Pixels& rgb) {
    std::vector<Rectangle> all;
    for (std::int64_t top = 0; top < rgb.height; top += SIDE)
        for (std::int64_t left = 0; left < rgb.width; left += SIDE)
            all.push_back({top, left, std::min(top + SIDE, rgb.height), std::min(left + SIDE, rgb.width)});
    return all;
}

std::int64_t level_at(const Pixels& rgb, std::int64_t y, std::int64_t x, std::int64_t channel) {
    std::int64_t place = (y * rgb.width + x) * 3 + channel;
    return rgb.bits() == 16 ? rgb.words[place] : rgb.bytes[place];
}

float most_of(const Pixels& rgb) { return rgb.bits() == 16 ? 65535.0F : 255.0F; }

// A rectangle of the picture, as planes in [0, 1].
Floats planes_of(const Pixels& rgb, const Rectangle& part) {
    Floats planes;
    planes.reserve(3 * part.height() * part.width());
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = part.top; y < part.bottom; ++y)
            for (std::int64_t x = part.left; x < part.right; ++x) planes.push_back(static_cast<float>(level_at(rgb, y, x, c)) / most_of(rgb));
    return planes;
}

// Blurs `groups` of `count` runs of `run` numbers with 1 2 1, `step` runs apart; the border's runs are repeated.
Floats blurred_once(const Floats& planes, std::int64_t step, std::int64_t groups, std::int64_t count, std::int64_t run) {
    Floats result(planes.size());
    for (std::int64_t group = 0; group < groups; ++group)
        for (std::int64_t i = 0; i < count; ++i) {
            std::int64_t first = group * count, before = (first + std::max<std::int64_t>(0, i - step)) * run;
            std::int64_t here = (first + i) * run, after = (first + std::min(count - 1, i + step)) * run;
            for (std::int64_t k = 0; k < run; ++k) {
                float sum = planes[before + k] + planes[here + k] * 2.0F;
                result[here + k] = (sum + planes[after + k]) * 0.25F;
            }
        }
    return result;
}

// What is left of planes after blurs, each twice as wide.
Floats blurred(Floats planes, std::int64_t height, std::int64_t width) {
    for (int level = 0; level < BLURS; ++level) {
        planes = blurred_once(planes, std::int64_t{1} << level, 3, height, width);
        planes = blurred_once(planes, std::int64_t{1} << level, 3 * height, width, 1);
    }
    return planes;
}

// The low frequencies of the source, and the high ones of the picture.
Floats wavelet(const Pixels& rgb, const Enlarged& source, const Rectangle& part) {
    Rectangle around{std::max<std::int64_t>(0, part.top - BLUR_REACH), std::max<std::int64_t>(0, part.left - BLUR_REACH),
                     std::min(rgb.height, part.bottom + BLUR_REACH), std::min(rgb.width, part.right + BLUR_REACH)};
    Floats planes = planes_of(rgb, around), low = source.crop(around.top, around.left, around.height(), around.width());
    for (std::size_t i = 0; i < planes.size(); ++i) low[i] -= planes[i];
    low = blurred(std::move(low), around.height(), around.width());  // the blur is linear: that of the difference is the difference of the blurs
    Floats inner;
    inner.reserve(3 * part.height() * part.width());
    for (std::int64_t c = 0; c < 3; ++c)
        for (std::int64_t y = part.top - around.top; y < part.bottom - around.top; ++y)
            for (std::int64_t x = part.left - around.left; x < part.right - around.left; ++x) {
                std::int64_t place = (c * around.height() + y) * around.width() + x;
                inner.push_back(planes[place] + low[place]);
            }
    return inner;
}

using Wide = unsigned __int128;

// The nearest double of a fraction, as Python divides whole numbers.
double quotient(Wide above, Wide below) {
    int shift = 0;
    while (above && above / below < (Wide{1} << 60) && above < (Wide{1} << 126)) above <<= 1, ++shift;
    auto whole = static_cast<std::uint64_t>(above / below);
    if (above % below) whole |= 1;  // below the last bit that rounding keeps
    return std::ldexp(static_cast<double>(whole), -shift);
}

struct Sums {
    std::int64_t values = 0;
    Wide squares = 0;

    void add(std::int64_t level) {
        values += level;
        squares += static_cast<Wide>(level) * static_cast<Wide>(level);
    }
};

struct Line {
    float gain, shift;
};

// For each channel the factor and the number to add that give it the mean and the spread of the source.
std::array<Line, 3> lines(const Pixels& rgb, const Enlarged& source) {
    std::array<Sums, 3> here, there;
    for (const auto& part : blocks(rgb)) {
        Floats planes = source.crop(part.top, part.left, part.height(), part.width());
        std::size_t place = 0;
        for (std::int64_t c = 0; c < 3; ++c)
            for (std::int64_t y = part.top; y < part.bottom; ++y)
                for (std::int64_t x = part.left; x < part.right; ++x) {
                    here[c].add(level_at(rgb, y, x, c));
                    there[c].add(static_cast<std::int64_t>(std::rint(planes[place++] * most_of(rgb))));
                }
    }
    auto count = static_cast<Wide>(rgb.height) * static_cast<Wide>(rgb.width);
    auto most = static_cast<double>(most_of(rgb));
    auto mean = [&](const Sums& sums) { return static_cast<double>(sums.values) / static_cast<double>(rgb.height * rgb.width) / most; };
    auto spread = [&](const Sums& sums) {
        auto values = static_cast<Wide>(sums.values);
        double variance = quotient(count * sums.squares - values * values, count * std::max<Wide>(1, count - 1));
        return std::pow(variance / (most * most) + LEAST_VARIANCE, 0.5);
    };
    std::array<Line, 3> all{};
    for (int c = 0; c < 3; ++c) {
        double gain = spread(there[c]) / spread(here[c]), scaled = mean(here[c]) * gain;
        all[c] = {static_cast<float>(gain), static_cast<float>(mean(there[c]) - scaled)};
    }
    return all;
}

}  // namespace

void recolor(Pixels& rgb, const std::string& color, const Pixels& source, std::int64_t scale) {
    if (color == "off") return;
    const Enlarged enlarged{source, scale, 1, 1};
    if (color == "adain") {
        auto all = lines(rgb, enlarged);
        for (const auto& part : blocks(rgb)) {
            Floats planes = planes_of(rgb, part);
            std::size_t place = 0;
            for (const auto& [gain, shift] : all)
                for (std::int64_t i = 0; i < part.height() * part.width(); ++i, ++place) {
                    float scaled = planes[place] * gain;
                    planes[place] = scaled + shift;
                }
            fill(rgb, part.top, part.left, planes.data(), part.height(), part.width());
        }
        return;
    }
    Pixels picture = rgb;  // a block reads the pixels around it as they were
    for (const auto& part : blocks(rgb)) fill(rgb, part.top, part.left, wavelet(picture, enlarged, part).data(), part.height(), part.width());
}

}  // namespace tw
