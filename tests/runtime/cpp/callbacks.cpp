// Callbacks that throw: a status and a line, and the bundle works afterwards.
//   callbacks BUNDLE
#include <tilewright.hpp>

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

int wrong = 0;

void expect(const char* what, bool fine) {
    wrong += !fine;
    std::printf("%s%s: %s\n", fine ? "" : "WRONG ", what, tw_last_error(nullptr));
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return 2;
    tilewright::Bundle bundle(words[1]);
    std::vector<std::uint8_t> pixels(3 * 30 * 20, 100);
    tw_image in{30, 20, TW_RGB8, 0, pixels.data()};
    auto status_with = [&](void (*change)(tw_options&)) {
        tw_options options = tw_default_options();
        change(options);
        tw_image out{};
        int status = tw_restore(bundle.get(), &in, &options, &out);
        tw_image_free(&out);
        return status;
    };
    auto threw = [&](void (*change)(tw_options&)) {
        return status_with(change) == TW_ERROR && std::strstr(tw_last_error(bundle.get()), "a callback threw an exception") != nullptr;
    };
    expect("on_progress throws", threw([](tw_options& o) { o.on_progress = [](const char*, int64_t, int64_t, void*) { throw 1; }; }));
    expect("on_part throws", threw([](tw_options& o) { o.on_part = [](const tw_part*, void*) { throw std::runtime_error("no"); }; }));
    expect("is_cancelled throws", threw([](tw_options& o) { o.is_cancelled = [](void*) -> int32_t { throw 1; }; }));
    expect("it works afterwards", status_with([](tw_options&) {}) == TW_OK);
    std::printf("%d wrong\n", wrong);
    return wrong ? 1 : 0;
}
