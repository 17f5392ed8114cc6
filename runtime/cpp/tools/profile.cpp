// tilewright-profile: how long a bundle takes for images of some sizes.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "options.hpp"

namespace {

const char* const HELP = R"(usage: tilewright-profile --bundle BUNDLE [--resolutions SIZES] [options]

  --resolutions SIZES sizes of the result: 512 or 2560x1440, with commas (default: 512,1024)
  --runs N            measured runs after a warm-up, at least 5 (default: 5)
%s  --json              print the numbers as JSON
  --version, --help
)";

using Clock = std::chrono::steady_clock;

struct Size {
    std::int32_t width, height;
};

std::vector<Size> resolutions(const std::string& text) {
    std::vector<Size> sizes;
    for (std::size_t at = 0; at <= text.size();) {
        std::size_t end = std::min(text.find(',', at), text.size());
        std::string part = text.substr(at, end - at);
        at = end + 1;
        Size size{};
        const char *first = part.data(), *last = first + part.size();
        auto wide = std::from_chars(first, last, size.width);
        auto high = wide;
        size.height = size.width;
        if (wide.ptr != last && *wide.ptr == 'x') high = std::from_chars(wide.ptr + 1, last, size.height);
        if (wide.ec != std::errc() || high.ec != std::errc() || high.ptr != last || size.width < 1 || size.height < 1)
            throw Usage("--resolutions " + part + " is no size; write 512 or 2560x1440");
        sizes.push_back(size);
    }
    return sizes;
}

struct First {
    Clock::time_point start;
    double seconds = 0;
};

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> all) {
    std::sort(all.begin(), all.end());
    std::size_t half = all.size() / 2;
    return all.size() % 2 ? all[half] : (all[half - 1] + all[half]) / 2;
}

struct Row {
    Size size;
    std::vector<double> seconds, first_part;
    std::int64_t needed_bytes = 0;
};

Row measured(const tilewright::Bundle& bundle, tw_options options, Size size, std::int32_t runs) {
    std::int32_t scale = options.scale ? options.scale : tw_scale(bundle.get());
    Row row{size, {}, {}, 0};
    std::int32_t width = (size.width + scale - 1) / scale, height = (size.height + scale - 1) / scale;
    std::vector<std::uint8_t> pixels(std::size_t{3} * width * height);
    std::uint32_t state = 1;  // a fixed picture of noise
    for (auto& pixel : pixels) state = state * 1664525 + 1013904223, pixel = static_cast<std::uint8_t>(state >> 24);
    bundle.check(tw_needed_bytes(bundle.get(), width, height, &options, &row.needed_bytes));
    for (std::int32_t i = 0; i <= runs; ++i) {
        First first{Clock::now()};
        options.user = &first;
        options.on_part = [](const tw_part*, void* user) {
            auto& its = *static_cast<First*>(user);
            if (its.seconds == 0) its.seconds = since(its.start);
        };
        bundle.restore({width, height, TW_RGB8, 0, pixels.data()}, options);
        if (i == 0) continue;  // the warm-up
        row.seconds.push_back(since(first.start));
        row.first_part.push_back(first.seconds);
    }
    return row;
}

std::string chosen_engines(const tilewright::Bundle& bundle) {
    std::string text;
    for (std::size_t i = 0; i < tw_engine_count(bundle.get()); ++i) {
        tw_engine engine;
        if (tw_engine_at(bundle.get(), i, &engine) != TW_OK || *engine.reason) continue;
        text += (text.empty() ? "" : ", ") + json_text(engine.component) + ": " + json_text(engine.name);
    }
    return "{" + text + "}";
}

int run(int count, char** words) {
    Words all = Words::read(count, words, "", " --resolutions --runs ");
    if (all.text("--help")) return std::printf(HELP, SHARED_HELP), 0;
    if (all.text("--version")) return std::printf("tilewright-profile %s\n", tw_version()), 0;
    if (!all.files.empty()) throw Usage("unexpected word " + all.files[0] + "; see --help");
    std::vector<Size> sizes = resolutions(all.text("--resolutions") ? all.text("--resolutions") : "512,1024");
    std::int32_t runs = 5;
    all.number("--runs", 0, runs);
    if (runs < 5) throw Usage("--runs " + std::to_string(runs) + " is too few for a median; use 5 or more");
    auto start = Clock::now();
    tilewright::Bundle bundle(all.text("--bundle") ? all.text("--bundle") : "", params_of(all));
    double open_s = since(start);
    std::vector<tw_value> values;
    tw_options options = options_of(all, values);
    bool json = all.text("--json");
    if (json) {
        std::printf("{\"bundle\": %s, \"system\": %s, ", json_text(bundle.digest()).c_str(), json_text(bundle.system()).c_str());
        std::printf("\"version\": %s, \"engines\": %s, ", json_text(tw_version()).c_str(), chosen_engines(bundle).c_str());
        std::printf("\"devices\": %s, \"runs\": %d, \"open_s\": %.6f, \"resolutions\": [", json_text(bundle.devices()).c_str(), runs, open_s);
    } else {
        std::printf("%s %s\n%s on %s, open in %.3f s, %d runs\n", bundle.system().c_str(), bundle.digest().substr(0, 12).c_str(), chosen_engines(bundle).c_str(),
                    bundle.devices().c_str(), open_s, runs);
        std::printf("%12s %9s %9s %12s %8s\n", "size", "p50 s", "max s", "first part s", "needs MB");
    }
    const char* between = "";
    for (const auto& size : sizes) {
        Row row = measured(bundle, options, size, runs);
        double p50 = median(row.seconds), max = *std::max_element(row.seconds.begin(), row.seconds.end());
        if (json) {
            std::printf("%s{\"width\": %d, \"height\": %d, \"seconds\": {\"p50\": %.6f, \"max\": %.6f}, ", between, size.width, size.height, p50, max);
            std::printf("\"first_part_s\": %.6f, \"needed_bytes\": %lld}", median(row.first_part), static_cast<long long>(row.needed_bytes));
        } else {
            const std::string name = std::to_string(size.width) + "x" + std::to_string(size.height);
            std::printf("%12s %9.4f %9.4f %12.4f %8lld\n", name.c_str(), p50, max, median(row.first_part), static_cast<long long>(row.needed_bytes / 1000000));
        }
        std::fflush(stdout);
        between = ", ";
    }
    if (json) std::printf("]}\n");
    return 0;
}

}  // namespace

int main(int count, char** words) { return guarded("tilewright-profile", run, count, words); }
