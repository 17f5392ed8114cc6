// PNG files as pixels of 8 bits, read as Pillow reads them, or of 16 bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Png {
    std::int32_t width = 0, height = 0, channels = 0, bits = 8;
    std::vector<std::uint8_t> pixels;   // those of 16 bits in the byte order of the machine
    std::vector<std::uint8_t> profile;  // ICC
};

// Each throws std::runtime_error with the reason.
Png read_png(const std::string& path, int bits);  // at most so many bits of a channel
void write_png(const std::string& path, const Png& image);
