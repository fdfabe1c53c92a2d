// Classifies a picture without Python:  ./classify model.pt2 photo.ppm
// The package: python scripts/export.py CHECKPOINT model.pt2 --format aoti.  The picture: ffmpeg or convert make a P6 .ppm.
//   T=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O1 docs/classify.cpp -o classify -I$T/include -L$T/lib -Wl,-rpath,$T/lib -ltorch -ltorch_cpu -lc10
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <sstream>

static at::Tensor numbers(const std::string& text) {  // "0.1 0.2 0.3" -> (3, 1, 1)
    std::istringstream words(text);
    const std::vector<float> found{std::istream_iterator<float>(words), {}};
    return at::tensor(found).view({-1, 1, 1});
}

static std::set<std::string> words(std::istream&& text) {  // compilers say amx-tile and Linux amx_tile
    std::set<std::string> found;
    for (std::string word; text >> word; found.insert(word)) {
        std::erase(word, '_');
        std::erase(word, '-');
    }
    return found;
}

int main(int, char** argv) try {
    using Loader = torch::inductor::AOTIModelPackageLoader;
    auto about = Loader::load_metadata_from_package(argv[1], "model");
    const auto processor = words(std::ifstream("/proc/cpuinfo"));  // empty elsewhere than on Linux
    for (const auto& name : words(std::istringstream(about["instructions"])))
        if (!processor.empty() && !processor.count(name))
            throw std::runtime_error("the package was compiled for a processor with " + name +
                                     ", which this one lacks; export it on a machine like this one");
    Loader package(argv[1]);
    std::ifstream file(argv[2], std::ios::binary);
    std::string kind;
    int64_t width = 0, height = 0, largest = 0;
    file >> kind >> width >> height >> largest;
    file.get();
    auto pixels = at::empty({height, width, 3}, at::kByte);
    file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel());
    if (kind != "P6" || !file) throw std::runtime_error("no P6 picture");

    // as in evaluations: the short side resized, the centre cut out, normalised
    const int64_t side = std::stoll(about["val_size"]), resize = std::stoll(about["val_resize"]);
    const int64_t shorter = std::min(width, height);
    height = height * resize / shorter, width = width * resize / shorter;
    auto image = pixels.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat) / double(largest);
    image = at::_upsample_bilinear2d_aa(image, {height, width}, false);
    image = image.narrow(2, (height - side) / 2, side).narrow(3, (width - side) / 2, side);
    image = ((image - numbers(about["mean"])) / numbers(about["std"])).contiguous();

    const auto best = package.run({image})[0].softmax(1)[0].max(0);  // (share, class)
    const int64_t index = std::get<1>(best).item<int64_t>();
    std::istringstream names(about["class_names"]);
    std::string name = std::to_string(index);
    for (int64_t i = 0; i <= index && std::getline(names, name); ++i) {}
    std::cout << name << " " << std::get<0>(best).item<float>() << std::endl;
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 2;
}
