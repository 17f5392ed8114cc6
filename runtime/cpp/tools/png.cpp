#include "png.hpp"

#include <png.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>

namespace {

constexpr std::uint64_t MOST_PIXELS = 100000000;

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File opened(const std::string& path, const char* mode) {
    File file(std::fopen(path.c_str(), mode), std::fclose);
    if (!file) throw std::runtime_error(std::strerror(errno));
    return file;
}

// libpng leaves its functions by longjmp, so nothing here that has a destructor may be made after setjmp.
void fail(png_structp png, png_const_charp message) {
    *static_cast<std::string*>(png_get_error_ptr(png)) = message;
    png_longjmp(png, 1);
}
void warn(png_structp, png_const_charp) {}

void fitting_profile(Png& image) {
    const char* kind = image.channels < 3 ? "GRAY" : "RGB ";
    if (image.profile.size() < 20 || std::memcmp(&image.profile[16], kind, 4) != 0) image.profile.clear();
}

}  // namespace

Png read_png(const std::string& path, int bits) {
    Png image;
    std::string reason;
    std::vector<png_bytep> rows;
    std::vector<std::uint8_t> wide;
    bool two_bytes = false;
    File file = opened(path, "rb");
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &reason, fail, warn);
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png))) {
        png_destroy_read_struct(&png, &info, nullptr);
        throw std::runtime_error(reason);
    }
    png_init_io(png, file.get());
    png_read_info(png, info);
    if (std::uint64_t{png_get_image_width(png, info)} * png_get_image_height(png, info) > MOST_PIXELS) png_error(png, "more than 100000000 pixels");
    two_bytes = png_get_bit_depth(png, info) == 16;
    bool grey = png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY;
    png_set_expand(png);
    if (two_bytes && bits == 8 && !grey) png_set_strip_16(png);  // as Pillow: the high byte
    bool grey_alpha = png_get_color_type(png, info) == PNG_COLOR_TYPE_GRAY_ALPHA;
    if (two_bytes && bits == 8 && grey_alpha) png_set_gray_to_rgb(png);  // as Pillow, too
    if (two_bytes && bits == 16) png_set_swap(png);              // to the byte order of this machine
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    image.width = static_cast<std::int32_t>(png_get_image_width(png, info));
    image.height = static_cast<std::int32_t>(png_get_image_height(png, info));
    image.channels = png_get_channels(png, info);
    wide.resize(png_get_rowbytes(png, info) * image.height);
    rows.reserve(image.height);
    for (std::int32_t y = 0; y < image.height; ++y) rows.push_back(&wide[png_get_rowbytes(png, info) * y]);
    png_read_image(png, rows.data());
    png_charp name = nullptr;
    png_bytep profile = nullptr;
    png_uint_32 length = 0;
    int method = 0;
    if (png_get_iCCP(png, info, &name, &method, &profile, &length)) image.profile.assign(profile, profile + length);
    png_destroy_read_struct(&png, &info, nullptr);
    image.bits = two_bytes && bits == 16 ? 16 : 8;
    if (two_bytes && grey && bits == 8) {  // rounded, as the Python runtime
        for (std::size_t i = 0; i < wide.size() / 2; ++i)
            image.pixels.push_back(static_cast<std::uint8_t>(((wide[2 * i] << 8 | wide[2 * i + 1]) + 128) / 257));
    } else {
        image.pixels = std::move(wide);
    }
    fitting_profile(image);
    return image;
}

void write_png(const std::string& path, const Png& image) {
    const std::string temporary = path + ".part";
    std::string reason;
    bool written = false;
    {
        File file = opened(temporary, "wb");
        png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &reason, fail, warn);
        png_infop info = png_create_info_struct(png);
        if (!setjmp(png_jmpbuf(png))) {
            const int types[] = {PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_GRAY_ALPHA, PNG_COLOR_TYPE_RGB, PNG_COLOR_TYPE_RGB_ALPHA};
            png_init_io(png, file.get());
            png_set_IHDR(png, info, image.width, image.height, image.bits, types[image.channels - 1], PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                         PNG_FILTER_TYPE_DEFAULT);
            if (!image.profile.empty()) png_set_iCCP(png, info, "ICC Profile", 0, image.profile.data(), image.profile.size());
            png_write_info(png, info);
            if (image.bits == 16) png_set_swap(png);
            for (std::int32_t y = 0; y < image.height; ++y)
                png_write_row(png, &image.pixels[static_cast<std::size_t>(y) * image.width * image.channels * image.bits / 8]);
            png_write_end(png, info);
            written = std::fflush(file.get()) == 0;
            if (!written) reason = std::strerror(errno);
        }
        png_destroy_write_struct(&png, &info);
    }
    if (written) std::filesystem::rename(temporary, path);
    if (!written) {
        std::filesystem::remove(temporary);
        throw std::runtime_error(reason);
    }
}
