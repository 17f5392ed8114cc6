// tilewright-restore: a PNG file in, a PNG file out.
#include <tilewright.hpp>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <map>
#include <vector>

#include "png.hpp"

namespace {

const char* const HELP = R"(usage: tilewright-restore --bundle BUNDLE IN.png OUT.png [options]

  --bundle BUNDLE     the folder of a bundle
  --seed N            of the noise (default 0)
  --steps N           of the sampler (default: as the bundle says)
  --set NAME=VALUE    an argument of the bundle; may be repeated. An array is its numbers with commas between them
  --tile N            side of the tiles, in pixels of the result
  --overlap N         width of the strip that tiles share
  --scale N           how many times the image is enlarged
  --batch N           most tiles in a call of a network
  --threads N         of a network (default: all cores)
  --engine NAME       the name or the precision of the engines
  --memory low        less memory, more time
  --weights-dir DIR   the folder of the weights, if they moved since the build
  --expect DIGEST     accept only this bundle
  --native FILE       Tilewright's own kernels, libtilewright_cpu.so
  --json              print what was done, as JSON
  --arguments         list the arguments of the bundle, and end
  --version, --help
)";

struct Usage : tilewright::Error {
    explicit Usage(const std::string& message) : Error(TW_USAGE, message.c_str()) {}
};

struct Words {
    std::map<std::string, std::string> options;
    std::vector<std::pair<std::string, std::string>> settings;
    std::vector<std::string> files;

    const char* text(const char* name) const {
        auto option = options.find(name);
        return option == options.end() ? nullptr : option->second.c_str();
    }
    template <class Number>
    void number(const char* name, Number& out) const {
        const char* text = this->text(name);
        if (!text) return;
        const char* end = text + std::char_traits<char>::length(text);
        auto result = std::from_chars(text, end, out);
        if (result.ec != std::errc() || result.ptr != end || out < 0) throw Usage(std::string(name) + " " + text + " is not a whole number of at least 0");
    }
};

Words read_words(int count, char** words) {
    const std::string alone = " --json --arguments --version --help ";
    const std::string with_value =
        " --bundle --seed --steps --set --tile --overlap --scale --batch --threads --engine --memory --weights-dir --expect --native ";
    Words all;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i], padded = " " + word + " ";
        if (word.rfind("--", 0) != 0) {
            all.files.push_back(word);
        } else if (alone.find(padded) != std::string::npos) {
            all.options[word] = "";
        } else if (with_value.find(padded) == std::string::npos) {
            throw Usage("unknown option " + word + "; see --help");
        } else if (i + 1 == count) {
            throw Usage(word + " needs a value; see --help");
        } else if (word == "--set") {
            std::string setting = words[++i];
            std::size_t equals = setting.find('=');
            if (equals == std::string::npos) throw Usage("--set " + setting + " is not NAME=VALUE");
            all.settings.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
        } else {
            all.options[word] = words[++i];
        }
    }
    return all;
}

void list_arguments(tw_bundle* bundle) {
    for (std::size_t i = 0; i < tw_argument_count(bundle); ++i) {
        tw_argument argument;
        if (tw_argument_at(bundle, i, &argument) == TW_OK)
            std::printf("%s: %s%s. %s\n", argument.name, argument.takes, argument.needed ? ", needed" : "", argument.help);
    }
}

int run(int count, char** words) {
    Words given = read_words(count, words);
    if (given.text("--help")) return std::fputs(HELP, stdout), 0;
    if (given.text("--version")) return std::printf("tilewright-restore %s\n", tw_version()), 0;
    if (!given.text("--bundle")) throw Usage("--bundle is missing; see --help");
    if (!given.text("--arguments") && given.files.size() != 2) throw Usage("give one input and one output; see --help");
    if (given.text("--memory") && std::string(given.text("--memory")) != "low" && std::string(given.text("--memory")) != "fast")
        throw Usage(std::string("--memory ") + given.text("--memory") + " is not one of fast, low");

    auto start = std::chrono::steady_clock::now();
    auto lap = [&start] {
        auto now = std::chrono::steady_clock::now();
        std::chrono::duration<double> spent = now - start;
        start = now;
        return spent.count();
    };
    tw_params params = tw_default_params();
    given.number("--threads", params.threads);
    given.number("--batch", params.batch);
    params.low_memory = given.text("--memory") && std::string(given.text("--memory")) == "low";
    params.engine = given.text("--engine");
    params.weights_dir = given.text("--weights-dir");
    params.expect = given.text("--expect");
    params.native_library = given.text("--native");
    tilewright::Bundle bundle(given.text("--bundle"), params);
    double open_s = lap();
    if (given.text("--arguments")) return list_arguments(bundle.get()), 0;

    const std::string &from = given.files[0], &to = given.files[1];
    std::error_code ignored;
    if (std::filesystem::path(to).extension() != ".png") throw Usage(to + " has another suffix than .png, the only one that this tool writes");
    if (std::filesystem::equivalent(from, to, ignored)) throw Usage(to + " is the input itself: name another file");
    Png image;
    try {
        image = read_png(from);
    } catch (const std::runtime_error& error) {
        throw tilewright::Error(TW_INPUT, (from + " cannot be read (" + error.what() + "): pass a PNG file").c_str());
    }
    tw_options options = tw_default_options();
    given.number("--seed", options.seed);
    given.number("--steps", options.steps);
    given.number("--tile", options.tile);
    given.number("--overlap", options.overlap);
    given.number("--scale", options.scale);
    std::vector<tw_value> values;
    for (const auto& [name, text] : given.settings) values.push_back({name.c_str(), text.c_str(), nullptr, nullptr, 0, nullptr});
    options.values = values.data();
    options.value_count = values.size();
    double read_s = lap();
    tilewright::Image out = bundle.restore({image.width, image.height, static_cast<tw_format>(image.channels), 0, image.pixels.data()}, options);
    double restore_s = lap();
    Png result{out->width, out->height, image.channels, {}, image.profile};
    result.pixels.assign(out->pixels, out->pixels + std::size_t{1} * out->width * out->height * image.channels);
    try {
        write_png(to, result);
    } catch (const std::exception& error) {
        throw tilewright::Error(TW_RESOURCE, (to + " cannot be written (" + error.what() + "): free space there or choose another path").c_str());
    }
    if (given.text("--json")) {
        std::printf("{\"system\": \"%s\", ", tw_system(bundle.get()));
        std::printf("\"digest\": \"%s\", \"width\": %d, \"height\": %d, ", tw_digest(bundle.get()), result.width, result.height);
        std::printf("\"seconds\": {\"open\": %.6f, \"read\": %.6f, \"restore\": %.6f, \"write\": %.6f}}\n", open_s, read_s, restore_s, lap());
    }
    return 0;
}

}  // namespace

int main(int count, char** words) {
    try {
        return run(count, words);
    } catch (const tilewright::Error& error) {
        std::fprintf(stderr, "tilewright-restore: %s\n", error.what());
        return error.status;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "tilewright-restore: internal error: %s\n", error.what());
        return TW_ERROR;
    }
}
