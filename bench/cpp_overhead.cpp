// How long the C++ library takes beside its networks: from opening to the first pixel, and for each image.
//   cmake --build build/cpp --target cpp_overhead && build/cpp/tests/cpp_overhead BUNDLE WIDTH HEIGHT RUNS [NAME=NUMBERS]...
// Prints JSON. WIDTH and HEIGHT are those of the input. Networks run with one thread.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "backends.hpp"
#include "restorer.hpp"

using namespace tw;

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> all) {
    std::sort(all.begin(), all.end());
    return all[all.size() / 2];
}

// The calls of one image, to run them again without the library.
struct Recorded {
    std::string component;
    Named<Tensor> inputs;
    Strings outputs;
};

class Recorder : public Device {
   public:
    explicit Recorder(std::shared_ptr<Device> device) : device_(std::move(device)) {}
    const std::string& name() const override { return device_->name(); }
    Named<Tensor> run(const std::string& component, const Named<Tensor>& inputs, const Strings& outputs) override {
        if (records) calls.push_back({component, inputs, outputs});
        return device_->run(component, inputs, outputs);
    }
    bool records = false;
    std::vector<Recorded> calls;

   private:
    std::shared_ptr<Device> device_;
};

}  // namespace

int main(int count, char** words) {
    if (count < 5) return std::fputs("usage: cpp_overhead BUNDLE WIDTH HEIGHT RUNS [NAME=NUMBERS]...\n", stderr), 2;
    try {
        const Path path = words[1];
        std::int64_t width = std::atoll(words[2]), height = std::atoll(words[3]);
        Picture picture{{height, width, 3, std::vector<std::uint8_t>(static_cast<std::size_t>(3 * height * width))}, std::nullopt, false};
        std::uint32_t state = 1;
        for (auto& byte : picture.rgb.bytes) state = state * 1664525 + 1013904223, byte = static_cast<std::uint8_t>(state >> 24);
        RestoreOptions options;
        for (int i = 5; i < count; ++i) {
            std::string word = words[i];
            std::size_t equals = word.find('=');
            options.values.push_back({word.substr(0, equals), word.substr(equals + 1), {}});
        }
        OpenOptions opening;
        opening.engine = "ort";
        opening.engines.threads = 1;
        opening.batch = 1;
        // sessions alone, and all from opening to the first pixel, in turns
        std::vector<double> sessions, first_pixels;
        Bundle bundle = read_bundle(path, std::nullopt);
        for (int i = 0; i < 7; ++i) {
            auto start = Clock::now();
            {
                std::vector<std::unique_ptr<Engine>> engines;
                for (const auto& name : bundle.program.components()) {
                    const EngineSpec& spec = bundle.manifest.components.at(name).engines[0];
                    EngineFiles files{{bundle.root / spec.files[0]}, bundle.files_of(name, std::nullopt), {}};
                    engines.push_back(backends().at("ort").open(files, spec.precision, opening.engines));
                }
                sessions.push_back(since(start));
            }
            start = Clock::now();
            double first = 0;
            Watch watch;
            watch.on_part = [&](const Pixels&, const Tile&) {
                if (first == 0) first = since(start);
            };
            Restorer(path, opening).restore(picture, options, watch);
            first_pixels.push_back(first);
        }
        std::shared_ptr<Recorder> recorder;
        opening.changed = [&](std::shared_ptr<Device> device) { return recorder = std::make_shared<Recorder>(std::move(device)); };
        Restorer restorer(path, opening);
        recorder->records = true;
        restorer.restore(picture, options, {});
        recorder->records = false;
        std::vector<double> whole, bare;
        for (int i = 0; i < std::atoi(words[4]); ++i) {
            auto start = Clock::now();
            restorer.restore(picture, options, {});
            whole.push_back(since(start));
            start = Clock::now();
            for (const auto& call : recorder->calls) recorder->run(call.component, call.inputs, call.outputs);
            bare.push_back(since(start));
        }
        std::printf("{\"sessions_s\": %.6f, \"open_to_first_pixel_s\": %.6f, \"restore_s\": %.6f, \"engines_alone_s\": %.6f, \"calls\": %zu}\n", median(sessions),
                    median(first_pixels), median(whole), median(bare), recorder->calls.size());
        return 0;
    } catch (const Error& error) {
        return std::fprintf(stderr, "%s\n", error.what()), error.code;
    }
}
