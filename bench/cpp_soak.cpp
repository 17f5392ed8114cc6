// Many restorations of many sizes in one process; prints the memory of the process as it goes on.
//   cmake --build build/cpp --target cpp_soak && build/cpp/tests/cpp_soak BUNDLE COUNT DEVICES
#include <tilewright.hpp>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

namespace {

double resident_mb() {
    std::ifstream file("/proc/self/status");
    for (std::string word; file >> word;)
        if (word == "VmRSS:" && file >> word) return std::atof(word.c_str()) / 1e3;
    return 0;
}

}  // namespace

int main(int count, char** words) {
    if (count != 4) return std::fputs("usage: cpp_soak BUNDLE COUNT DEVICES\n", stderr), 2;
    try {
        tw_params params = tw_default_params();
        params.devices = words[3];
        params.threads = 1;
        int restorations = std::atoi(words[2]), parts = 0;
        std::uint32_t state = 1;
        auto random = [&state](int most) { return static_cast<int>((state = state * 1664525 + 1013904223) >> 8) % most; };
        tilewright::Bundle bundle(words[1], params);
        for (int i = 1; i <= restorations; ++i) {
            if (i % 500 == 0) bundle = tilewright::Bundle(words[1], params);  // opened anew
            int width = 16 + random(120), height = 16 + random(120), channels = 1 + random(4);
            std::vector<std::uint8_t> pixels(std::size_t{1} * width * height * channels);
            for (auto& pixel : pixels) pixel = static_cast<std::uint8_t>(random(256));
            tw_options options = tw_default_options();
            options.seed = i;
            options.tile = 64;
            options.user = &parts;
            options.on_part = [](const tw_part*, void* user) { ++*static_cast<int*>(user); };
            if (i % 7 == 0) options.is_cancelled = [](void* user) -> int32_t { return *static_cast<int*>(user) % 2; };
            try {
                bundle.restore({width, height, static_cast<tw_format>(channels), 0, pixels.data()}, options);
            } catch (const tilewright::Error& error) {
                if (error.status != TW_CANCELLED) throw;
            }
            if (i % (restorations / 10) == 0) std::printf("%d restorations, %d parts, %.1f MB\n", i, parts, resident_mb());
            std::fflush(stdout);
        }
        return 0;
    } catch (const tilewright::Error& error) {
        return std::fprintf(stderr, "%s\n", error.what()), error.status;
    }
}
