// tilewright-restore: a PNG file in, a PNG file out.
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "options.hpp"
#include "png.hpp"

namespace {

const char* const HELP = R"(usage: tilewright-restore --bundle BUNDLE IN.png OUT.png [options]

%s  --bits N            of a channel of the result: 8, or 16, which keeps 16 bits of the source (default: 8)
  --json              print what was done, as JSON
  --arguments         list the arguments of the bundle, and end
  --engines           list the engines of the bundle, and why each was not chosen, and end
  --version, --help
)";

void list_arguments(tw_bundle* bundle) {
    for (std::size_t i = 0; i < tw_argument_count(bundle); ++i) {
        tw_argument argument;
        if (tw_argument_at(bundle, i, &argument) == TW_OK)
            std::printf("%s: %s%s. %s\n", argument.name, argument.takes, argument.needed ? ", needed" : "", argument.help);
    }
}

void list_engines(tw_bundle* bundle) {
    for (std::size_t i = 0; i < tw_engine_count(bundle); ++i) {
        tw_engine engine;
        if (tw_engine_at(bundle, i, &engine) == TW_OK)
            std::printf("%s: %s %s\n", engine.component, engine.name, *engine.reason ? engine.reason : "was chosen");
    }
}

int run(int count, char** words) {
    Words all = Words::read(count, words, " --arguments --engines ", " --bits ");
    if (all.text("--help")) return std::printf(HELP, SHARED_HELP), 0;
    if (all.text("--version")) return std::printf("tilewright-restore %s\n", tw_version()), 0;
    tw_params params = params_of(all);
    bool lists = all.text("--arguments") || all.text("--engines");
    if (!lists && all.files.size() != 2) throw Usage("give one input and one output; see --help");
    std::int32_t bits = 8;
    all.number("--bits", bits);
    if (bits != 8 && bits != 16) throw Usage("--bits " + std::to_string(bits) + " is no depth of a channel; use 8 or 16");

    auto start = std::chrono::steady_clock::now();
    auto lap = [&start] {
        auto now = std::chrono::steady_clock::now();
        std::chrono::duration<double> spent = now - start;
        start = now;
        return spent.count();
    };
    tilewright::Bundle bundle(all.text("--bundle"), params);
    double open_s = lap();
    if (all.text("--arguments")) list_arguments(bundle.get());
    if (all.text("--engines")) list_engines(bundle.get());
    if (lists) return 0;

    const std::string &from = all.files[0], &to = all.files[1];
    std::error_code ignored;
    if (std::filesystem::path(to).extension() != ".png") throw Usage(to + " has another suffix than .png, the only one that this tool writes");
    if (std::filesystem::equivalent(from, to, ignored)) throw Usage(to + " is the input itself: name another file");
    Png image;
    try {
        image = read_png(from, bits);
    } catch (const std::runtime_error& error) {
        throw tilewright::Error(TW_INPUT, (from + " cannot be read (" + error.what() + "): pass a PNG file").c_str());
    }
    std::vector<tw_value> values;
    tw_options options = options_of(all, values);
    options.bits = bits;
    options.on_note = [](const char* note, void*) { std::fprintf(stderr, "tilewright-restore: %s\n", note); };
    double read_s = lap();
    auto format = static_cast<tw_format>(image.channels + (image.bits == 16 ? 16 : 0));
    tilewright::Image out = bundle.restore({image.width, image.height, format, 0, image.pixels.data()}, options);
    double restore_s = lap();
    Png result{out->width, out->height, image.channels, bits, {}, image.profile};
    const auto* pixels = static_cast<const std::uint8_t*>(out->pixels);
    result.pixels.assign(pixels, pixels + std::size_t{1} * out->width * out->height * image.channels * bits / 8);
    try {
        write_png(to, result);
    } catch (const std::exception& error) {
        throw tilewright::Error(TW_RESOURCE, (to + " cannot be written (" + error.what() + "): free space there or choose another path").c_str());
    }
    if (all.text("--json")) {
        std::printf("{\"system\": \"%s\", \"digest\": \"%s\", \"devices\": \"%s\", ", bundle.system().c_str(), bundle.digest().c_str(), bundle.devices().c_str());
        std::printf("\"width\": %d, \"height\": %d, \"bits\": %d, ", result.width, result.height, bits);
        std::printf("\"seconds\": {\"open\": %.6f, \"read\": %.6f, \"restore\": %.6f, \"write\": %.6f}}\n", open_s, read_s, restore_s, lap());
    }
    return 0;
}

}  // namespace

int main(int count, char** words) { return guarded("tilewright-restore", run, count, words); }
