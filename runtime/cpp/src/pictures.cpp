#include "pictures.hpp"

#include <cstring>

namespace tw {
namespace {

constexpr std::int64_t MOST_PIXELS = 100000000;  // of an input image, as the command line

void check_image(const tw_image& image) {
    if (!image.pixels) throw Error(usage, "the pixels are NULL; give their address");
    int channels = channels_of(image);
    if (channels < 1 || channels > 4 || (image.format != channels && image.format != channels + 16))
        throw Error(usage, "format " + std::to_string(image.format) + " is none of tw_format, such as TW_RGB8 or TW_GRAY16");
    if (image.width < 1 || image.height < 1)
        throw Error(usage, "the image is " + std::to_string(image.width) + "x" + std::to_string(image.height) + " and has no pixels: pass one of at least 1x1");
    if (std::int64_t{image.width} * image.height > MOST_PIXELS)
        throw Error(usage, "the image is " + std::to_string(image.width) + "x" + std::to_string(image.height) + ", over the limit of " +
                               std::to_string(MOST_PIXELS) + " pixels; cut it into parts");
}

// What the Python runtime makes of 16 bits: grey is rounded, colours lose their low byte.
std::uint8_t reduced(std::uint16_t word, int channels) { return static_cast<std::uint8_t>(channels == 1 ? (word + 128) / 257 : word >> 8); }

std::size_t size_of(const Pixels& pixels) { return static_cast<std::size_t>(pixels.height * pixels.width * pixels.channels); }

// The alpha of a result, in its bits.
Pixels alpha_of(const Pixels& alpha, std::int64_t scale, int bits) {
    Pixels out{alpha.height * scale, alpha.width * scale, 1, {}};
    if (alpha.bits() == 16) {
        for (float level : enlarged_levels(alpha, scale)) {
            float wide = level * 65535.0F;
            out.words.push_back(static_cast<std::uint16_t>(wide + 0.5F));
        }
        return out;
    }
    out.bytes = scale == 1 ? alpha.bytes : enlarged(alpha, scale).bytes;
    if (bits == 8) return out;
    for (auto byte : out.bytes) out.words.push_back(static_cast<std::uint16_t>(byte * 257));
    out.bytes.clear();
    return out;
}

template <class Number>
void interleave(const std::vector<Number>& colour, std::size_t channels, const std::vector<Number>& alpha, const tw_image& out) {
    std::size_t stride = stride_of(out), width = static_cast<std::size_t>(out.width), i = 0;
    for (std::int32_t y = 0; y < out.height; ++y) {
        auto* to = static_cast<unsigned char*>(out.pixels) + static_cast<std::size_t>(y) * stride;
        for (std::size_t x = 0; x < width; ++x, ++i) {
            std::memcpy(to, &colour[channels * i], channels * sizeof(Number));
            to += channels * sizeof(Number);
            if (alpha.empty()) continue;
            std::memcpy(to, &alpha[i], sizeof(Number));
            to += sizeof(Number);
        }
    }
}

}  // namespace

int channels_of(const tw_image& image) { return static_cast<int>(image.format) & 15; }
int bits_of(const tw_image& image) { return image.format > 16 ? 16 : 8; }

std::size_t stride_of(const tw_image& image) {
    std::size_t row = static_cast<std::size_t>(image.width) * channels_of(image) * bits_of(image) / 8;
    if (image.stride && image.stride < row)
        throw Error(usage, "stride " + std::to_string(image.stride) + " is shorter than a row of " + std::to_string(row) + " bytes; give 0 or more");
    return image.stride ? image.stride : row;
}

Picture split(const tw_image& image, int bits) {
    check_image(image);
    std::size_t stride = stride_of(image);
    int channels = channels_of(image);
    bool grey = channels < 3, has_alpha = channels % 2 == 0, wide = bits_of(image) == 16, words = wide && bits == 16;
    Picture picture{{image.height, image.width, 3, {}}, std::nullopt, grey};
    if (has_alpha) picture.alpha = Pixels{image.height, image.width, 1, {}};
    auto put = [&](Pixels& pixels, std::uint16_t level) {
        if (words) {
            pixels.words.push_back(level);
        } else {
            pixels.bytes.push_back(wide ? reduced(level, channels) : static_cast<std::uint8_t>(level));
        }
    };
    std::size_t count = size_of(picture.rgb);
    words ? picture.rgb.words.reserve(count) : picture.rgb.bytes.reserve(count);
    for (std::int32_t y = 0; y < image.height; ++y) {
        const auto* p = static_cast<const unsigned char*>(image.pixels) + static_cast<std::size_t>(y) * stride;
        for (std::int32_t x = 0; x < image.width; ++x) {
            std::uint16_t levels[4] = {};
            for (int c = 0; c < channels; ++c, p += wide ? 2 : 1) {
                if (wide) {
                    std::memcpy(&levels[c], p, 2);
                } else {
                    levels[c] = *p;
                }
            }
            for (int c = 0; c < 3; ++c) put(picture.rgb, levels[grey ? 0 : c]);
            if (has_alpha) put(*picture.alpha, levels[channels - 1]);
        }
    }
    return picture;
}

void assemble(const Picture& picture, const Pixels& rgb, std::int64_t scale, const tw_image& out) {
    Pixels grey = picture.grey ? luma(rgb) : Pixels{}, alpha = picture.alpha ? alpha_of(*picture.alpha, scale, rgb.bits()) : Pixels{};
    const Pixels& colour = picture.grey ? grey : rgb;
    std::size_t channels = picture.grey ? 1 : 3;
    if (rgb.bits() == 8) {
        interleave(colour.bytes, channels, alpha.bytes, out);
    } else {
        interleave(colour.words, channels, alpha.words, out);
    }
}

}  // namespace tw
