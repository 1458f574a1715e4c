// A plain driver for the fuzz target, where there is no libFuzzer: seeded, single-threaded.
//
//   driver --write-seeds DIR                     writes the seed corpus
//   driver [--executions N] [--seconds S] [--seed X] [--crashes DIR] [CORPUS]
//
// Runs the inputs of CORPUS, a directory or a file (else the built-in seeds), once, then
// mutants of them until N executions or S seconds are over. Mutants that take new edges
// join the corpus and its directory.
// A crash leaves its input in the directory of --crashes (default: here) and exits non-zero.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "edges.h"
#include "mutate.h"
#include "seeds.h"
#include "target.h"

namespace fs = std::filesystem;
using rle::fuzz::Bytes;

extern "C" int LLVMFuzzerInitialize(int*, char***);
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t*, std::size_t);
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t*, std::size_t, std::size_t);
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

constexpr unsigned kLongestExecution = 20;  // seconds

rle::fuzz::Random* driver_random = nullptr;
Bytes current;
std::string crash_path;

void save_current() {
  if (FILE* file = std::fopen(crash_path.c_str(), "wb")) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
    std::fprintf(stderr, "the input is saved as %s\n", crash_path.c_str());
  }
}

void on_signal(int signal) {
  std::fprintf(stderr, "\nsignal %d%s\n", signal,
               signal == SIGALRM ? ": an execution is too long" : "");
  save_current();
  _exit(1);
}

void run(const Bytes& input) {
  current = input;
  alarm(kLongestExecution);
  LLVMFuzzerTestOneInput(current.data(), current.size());
}

void write(const fs::path& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

std::string name_of(const Bytes& input) {
  return "edge" + std::to_string(rle::xxh3(input.data(), input.size()));
}

void write_corpus(const fs::path& directory, const std::vector<Bytes>& inputs) {
  fs::create_directories(directory);
  for (std::size_t i = 0; i < inputs.size(); ++i)
    write(directory / ("seed" + std::to_string(i)), inputs[i]);
}

std::vector<Bytes> read_corpus(const std::string& corpus) {
  if (corpus.empty()) return rle::fuzz::seeds();
  std::vector<fs::path> paths;
  if (fs::is_directory(corpus))
    for (const auto& file : fs::directory_iterator(corpus)) paths.push_back(file.path());
  else
    paths.push_back(corpus);
  std::sort(paths.begin(), paths.end());
  std::vector<Bytes> inputs;
  for (const fs::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return inputs;
}

struct Options {
  rle::u64 executions = 100000;
  double seconds = 1e18;
  rle::u64 seed = 0;
  std::string crashes = ".";
  std::string seeds;
  std::string corpus;
};

Options read_options(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto next = [&]() -> std::string { return i + 1 < count ? words[++i] : ""; };
    if (word == "--executions") options.executions = std::stoull(next());
    else if (word == "--seconds") options.seconds = std::stod(next());
    else if (word == "--seed") options.seed = std::stoull(next());
    else if (word == "--crashes") options.crashes = next();
    else if (word == "--write-seeds") options.seeds = next();
    else options.corpus = word;
  }
  return options;
}

// The shorter of two: short inputs run faster and reach as much.
const Bytes& pick(const std::vector<Bytes>& corpus, rle::fuzz::Random& random) {
  const Bytes& left = corpus[random.below(corpus.size())];
  const Bytes& right = corpus[random.below(corpus.size())];
  return left.size() < right.size() ? left : right;
}

Bytes mutant(const std::vector<Bytes>& corpus, rle::fuzz::Random& random) {
  const Bytes& base = pick(corpus, random);
  if (!random.one_in(10)) return rle::fuzz::mutated(base.data(), base.size(), random);
  const Bytes& other = pick(corpus, random);
  return rle::fuzz::crossed(base.data(), base.size(), other.data(), other.size(), random);
}

void fuzz(const Options& options, std::vector<Bytes> corpus) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  for (const Bytes& input : corpus) run(input);
  rle::fuzz::new_edges();
  const rle::u64& done = rle::fuzz::tally().executions;
  while (!corpus.empty() && done < options.executions && passed() < options.seconds) {
    run(mutant(corpus, *driver_random));
    if (rle::fuzz::new_edges() == 0) continue;
    corpus.push_back(current);
    if (fs::is_directory(options.corpus))
      write(fs::path(options.corpus) / name_of(current), current);
  }
  alarm(0);
  std::fprintf(stderr, "executions/s %.0f\nedges %zu\ncorpus %zu inputs\n",
               static_cast<double>(done) / passed(), rle::fuzz::known_edges(), corpus.size());
}

}  // namespace

// Simpler than libFuzzer's: one to three bytes change, or a piece is moved.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* bytes, std::size_t size, std::size_t most) {
  rle::fuzz::Random& random = *driver_random;
  if (size == 0 || (size < most && random.one_in(4))) {
    if (size == most) return size;
    bytes[size] = static_cast<std::uint8_t>(random.next());
    return size + 1;
  }
  for (rle::u64 left = 1 + random.below(3); left > 0; --left)
    bytes[random.below(size)] = static_cast<std::uint8_t>(random.next());
  if (random.one_in(4)) {
    const std::size_t from = random.below(size), to = random.below(size);
    std::memmove(bytes + to, bytes + from, random.below(size - std::max(from, to)));
  }
  return size;
}

int main(int count, char** words) {
  const Options options = read_options(count, words);
  if (!options.seeds.empty()) {
    write_corpus(options.seeds, rle::fuzz::seeds());
    return 0;
  }
  crash_path = options.crashes + "/crash-" + std::to_string(getpid());
  for (const int signal : {SIGABRT, SIGALRM}) std::signal(signal, on_signal);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(save_current);
  rle::fuzz::Random random(options.seed);
  driver_random = &random;
  LLVMFuzzerInitialize(nullptr, nullptr);
  fuzz(options, read_corpus(options.corpus));
  return 0;
}
