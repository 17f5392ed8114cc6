// The words of a command line, and the options that both tools have.
#pragma once

#include <tilewright.hpp>

#include <map>
#include <string>
#include <vector>

struct Usage : tilewright::Error {
    explicit Usage(const std::string& message) : Error(TW_USAGE, message.c_str()) {}
};

struct Words {
    std::map<std::string, std::string> options;
    std::vector<std::pair<std::string, std::string>> settings;  // of --set
    std::vector<std::string> files;

    const char* text(const char* name) const;
    void number(const char* name, std::int32_t least, std::int32_t& out) const;
    void number(const char* name, std::int64_t least, std::int64_t& out) const;
    // A wrong word is refused. `alone`, `with_value`: options between spaces, beside those of both tools.
    static Words read(int count, char** words, const std::string& alone, const std::string& with_value);
};

extern const char* const SHARED_HELP;

tw_params params_of(const Words& words);
// The values lie in `values`, and their texts in `words`.
tw_options options_of(const Words& words, std::vector<tw_value>& values);
std::string json_text(const std::string& text);
// Runs a tool, tells an error in one line, and returns the exit code.
int guarded(const char* tool, int (*run)(int count, char** words), int count, char** words);
