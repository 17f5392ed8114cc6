// A caller's image taken apart into colours and alpha, and a result put together with the same layout.
#pragma once

#include "images.hpp"
#include "tilewright.h"

namespace tw {

struct Picture {
    Pixels rgb;
    std::optional<Pixels> alpha;
    bool grey;
};

int channels_of(const tw_image& image);
int bits_of(const tw_image& image);
std::size_t stride_of(const tw_image& image);  // refuses one that is shorter than a row

// Each throws Error(usage).
Picture split(const tw_image& image, int bits);  // in 8 bits for a result of 8 bits
void assemble(const Picture& picture, const Pixels& rgb, std::int64_t scale, const tw_image& out);

}  // namespace tw
