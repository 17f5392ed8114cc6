// PNG files as 8-bit pixels, read as Pillow reads them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Png {
    std::int32_t width = 0, height = 0, channels = 0;
    std::vector<std::uint8_t> pixels;
    std::vector<std::uint8_t> profile;  // ICC
};

// Each throws std::runtime_error with the reason.
Png read_png(const std::string& path);
void write_png(const std::string& path, const Png& image);
