// Colours of a restored picture, taken from the enlarged input. As runtime/images/color.py.
#pragma once

#include "images.hpp"

namespace tw {

extern const Strings COLORS;  // off, wavelet, adain

// Gives a picture the colours of its source: the low frequencies, or the mean and the spread of each channel.
void recolor(Pixels& rgb, const std::string& color, const Pixels& source, std::int64_t scale);

}  // namespace tw
