// Restores a picture in the binary PPM format: minimal BUNDLE < in.ppm > out.ppm
#include <tilewright.hpp>

#include <iostream>
#include <vector>

int main(int count, char** words) try {
    std::string magic;
    tw_image in{0, 0, TW_RGB8, 0, nullptr};
    int most = 0;
    if (count != 2 || !(std::cin >> magic >> in.width >> in.height >> most) || magic != "P6" || most != 255) return 2;
    std::vector<char> pixels(std::size_t{3} * in.width * in.height);
    std::cin.ignore().read(pixels.data(), static_cast<std::streamsize>(pixels.size()));
    in.pixels = pixels.data();

    tilewright::Image out = tilewright::Bundle(words[1]).restore(in);
    std::cout << "P6 " << out->width << " " << out->height << " 255\n";
    std::cout.write(static_cast<const char*>(out->pixels), std::streamsize{3} * out->width * out->height);
} catch (const tilewright::Error& error) {
    std::cerr << error.what() << "\n";
    return error.status;
}
