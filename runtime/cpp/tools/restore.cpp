// tilewright-restore: a PNG file in, a PNG file out; or those of a folder.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>

#include "options.hpp"
#include "png.hpp"

namespace {

const char* const HELP = R"(usage: tilewright-restore --bundle BUNDLE IN.png OUT.png [options]
       tilewright-restore --bundle BUNDLE FOLDER OTHER-FOLDER [options]

%s  --bits N            of a channel of the result: 8, or 16, which keeps 16 bits of the source (default: 8)
  --color HOW         wavelet takes the input's low frequencies, adain its mean and spread (default: off)
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

namespace fs = std::filesystem;

struct Pair {
    std::string from, to;
};

void check_folder_of(const fs::path& path) {
    std::error_code ignored;
    const fs::path folder = path.has_parent_path() ? path.parent_path() : ".";
    if (!fs::is_directory(folder, ignored)) throw Usage(path.string() + " is in " + folder.string() + ", which is not a directory: create it first");
}

// Refuses an output that could not be written, before any work.
void check_output(const fs::path& from, const fs::path& to) {
    std::error_code ignored;
    if (to.extension() != ".png") throw Usage(to.string() + " has another suffix than .png, the only one that this tool writes");
    if (fs::is_directory(to, ignored)) throw Usage(to.string() + " is a directory: name a file");
    check_folder_of(to);
    if (fs::equivalent(from, to, ignored)) throw Usage(to.string() + " is the input itself: name another file");
}

bool is_png(const fs::path& path) {
    std::string suffix = path.extension().string();
    for (char& c : suffix) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    return suffix == ".png";
}

// The PNG files of a folder, sorted, with the files that they become.
std::vector<Pair> images_of(const fs::path& folder, const fs::path& into) {
    std::error_code error;
    if (fs::exists(into, error) && !fs::is_directory(into, error)) throw Usage(into.string() + " is a file, " + folder.string() + " a folder: name a folder for the results");
    if (fs::equivalent(folder, into, error)) throw Usage(into.string() + " is the input itself: name another folder");
    std::map<fs::path, fs::path> sources;  // by their results
    std::size_t others = 0;
    fs::directory_iterator entries(folder, error);
    if (error) throw tilewright::Error(TW_INPUT, (folder.string() + " cannot be read (" + error.message() + "): check the path").c_str());
    for (const auto& entry : entries) {
        const fs::path& path = entry.path();
        if (entry.is_directory(error) || path.filename().string()[0] == '.') continue;
        others += !is_png(path);
        if (!is_png(path)) continue;
        auto [other, fresh] = sources.emplace(into / path.stem().concat(".png"), path);
        if (!fresh) throw Usage(other->second.filename().string() + " and " + path.filename().string() + " would both become " + other->first.string() + "; rename one of them");
    }
    if (sources.empty()) throw tilewright::Error(TW_INPUT, (folder.string() + " holds no images; their suffix is .png").c_str());
    if (others) std::fprintf(stderr, "tilewright-restore: %zu other file(s) of %s are left out; their suffix is not .png\n", others, folder.c_str());
    check_folder_of(into);
    std::vector<Pair> pairs;
    pairs.reserve(sources.size());
    for (const auto& [to, from] : sources) pairs.push_back({from.string(), to.string()});
    return pairs;
}

class Clock {
   public:
    double lap() {
        auto now = std::chrono::steady_clock::now();
        std::chrono::duration<double> spent = now - start_;
        start_ = now;
        return spent.count();
    }

   private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct Done {
    std::int32_t width, height;
    double read_s, restore_s, write_s;
};

Done restore(const tilewright::Bundle& bundle, const Pair& files, const tw_options& options) {
    const auto& [from, to] = files;
    Clock clock;
    Png image;
    try {
        image = read_png(from, options.bits);
    } catch (const std::runtime_error& error) {
        throw tilewright::Error(TW_INPUT, (from + " cannot be read (" + error.what() + "): pass a PNG file").c_str());
    }
    double read_s = clock.lap();
    auto format = static_cast<tw_format>(image.channels + (image.bits == 16 ? 16 : 0));
    tilewright::Image out = bundle.restore({image.width, image.height, format, 0, image.pixels.data()}, options);
    double restore_s = clock.lap();
    Png result{out->width, out->height, image.channels, options.bits, {}, image.profile};
    const auto* pixels = static_cast<const std::uint8_t*>(out->pixels);
    result.pixels.assign(pixels, pixels + std::size_t{1} * out->width * out->height * image.channels * options.bits / 8);
    try {
        write_png(to, result);
    } catch (const std::exception& error) {
        throw tilewright::Error(TW_RESOURCE, (to + " cannot be written (" + error.what() + "): free space there or choose another path").c_str());
    }
    return {result.width, result.height, read_s, restore_s, clock.lap()};
}

std::string json_of(const Done& done, int bits) {
    char text[200];
    std::snprintf(text, sizeof text, "\"width\": %d, \"height\": %d, \"bits\": %d, \"seconds\": {\"read\": %.6f, \"restore\": %.6f, \"write\": %.6f}",
                  done.width, done.height, bits, done.read_s, done.restore_s, done.write_s);
    return text;
}

// Restores the images of a folder. One that fails does not stop the others. Returns the rows of the answer.
std::string restore_all(const tilewright::Bundle& bundle, const std::vector<Pair>& pairs, const tw_options& options, std::int32_t& code) {
    std::string rows, first;
    std::size_t failed = 0;
    std::error_code ignored;  // an image that cannot be written says why
    fs::create_directory(fs::path(pairs[0].to).parent_path(), ignored);
    for (const auto& pair : pairs) {
        rows += (rows.empty() ? "" : ", ") + ("{\"input\": " + json_text(pair.from)) + ", \"output\": " + json_text(pair.to) + ", ";
        try {
            rows += json_of(restore(bundle, pair, options), options.bits) + "}";
        } catch (const tilewright::Error& error) {
            std::string message = error.what();
            if (message.find(pair.from) == std::string::npos) message = pair.from + ": " + message;
            rows += "\"error\": {\"code\": " + std::to_string(error.status) + ", \"message\": " + json_text(message) + "}}";
            if (!failed++) first = message, code = error.status;
        }
    }
    if (failed) std::fprintf(stderr, "tilewright-restore: %zu of %zu images failed, the first is %s\n", failed, pairs.size(), first.c_str());
    return "\"images\": [" + rows + "], \"failed\": " + std::to_string(failed);
}

int run(int count, char** words) {
    Words all = Words::read(count, words, " --arguments --engines ", " --bits --color ");
    if (all.text("--help")) return std::printf(HELP, SHARED_HELP), 0;
    if (all.text("--version")) return std::printf("tilewright-restore %s\n", tw_version()), 0;
    tw_params params = params_of(all);
    bool lists = all.text("--arguments") || all.text("--engines");
    if (!lists && all.files.size() != 2) throw Usage("give one input and one output; see --help");
    std::vector<tw_value> values;
    tw_options options = options_of(all, values);
    options.bits = 8;
    all.number("--bits", 0, options.bits);
    if (options.bits != 8 && options.bits != 16) throw Usage("--bits " + std::to_string(options.bits) + " is no depth of a channel; use 8 or 16");
    options.color = all.text("--color");
    options.on_note = [](const char* note, void*) { std::fprintf(stderr, "tilewright-restore: %s\n", note); };
    std::error_code ignored;
    bool folder = !lists && fs::is_directory(all.files[0], ignored);
    if (!lists && !folder) check_output(all.files[0], all.files[1]);
    std::vector<Pair> pairs;
    if (folder) pairs = images_of(all.files[0], all.files[1]);

    Clock clock;
    tilewright::Bundle bundle(all.text("--bundle"), params);
    double open_s = clock.lap();
    if (all.text("--arguments")) list_arguments(bundle.get());
    if (all.text("--engines")) list_engines(bundle.get());
    if (lists) return 0;
    std::int32_t code = TW_OK;
    std::string answer = folder ? restore_all(bundle, pairs, options, code) : json_of(restore(bundle, {all.files[0], all.files[1]}, options), options.bits);
    if (all.text("--json"))
        std::printf("{\"system\": %s, \"digest\": %s, \"devices\": %s, \"open_s\": %.6f, %s}\n", json_text(bundle.system()).c_str(),
                    json_text(bundle.digest()).c_str(), json_text(bundle.devices()).c_str(), open_s, answer.c_str());
    return code;
}

}  // namespace

int main(int count, char** words) { return guarded("tilewright-restore", run, count, words); }
