package image

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/musternet/muster/api"
)

// Pack writes an archive at outPath whose image holds the static Linux binary
// at binaryPath, and says what it wrote. Binary and Platform of the options are
// taken from the binary. The archive appears at outPath only once it is whole.
func Pack(binaryPath, outPath string, o Options) (Info, error) {
	platform, err := staticPlatform(binaryPath)
	if err != nil {
		return Info{}, err
	}
	if o.Platform != "" && o.Platform != platform {
		return Info{}, api.Errorf(api.Invalid, "%s is built for %s, not for %s", binaryPath, platform, o.Platform)
	}
	o.Binary, o.Platform = binaryPath, platform
	img, err := Scratch(o)
	if err != nil {
		return Info{}, err
	}
	if err := writeFile(outPath, tagFor(programName(o)), img); err != nil {
		return Info{}, err
	}
	return Inspect(outPath)
}

// tagFor makes a repository name out of a file name.
func tagFor(program string) string {
	repository := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, strings.ToLower(program))
	if repository = strings.Trim(repository, "-"); len(repository) < 2 {
		repository = "job-" + repository + "0"
	}
	return "muster/" + repository + ":packed"
}

func writeFile(path, ref string, img v1.Image) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := errors.Join(WriteArchive(f, ref, img), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}

// staticPlatform is the platform of a Linux program that needs nothing else to
// run, which is the only kind that works in an image without a system in it.
func staticPlatform(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if wasm, err := isWasm(f); err != nil || wasm {
		if err == nil {
			err = api.Errorf(api.Invalid, "%s is a WebAssembly module: it needs no image, name it in the job as it is", path)
		}
		return "", err
	}
	program, err := elf.NewFile(f)
	if err != nil {
		return "", api.Errorf(api.Invalid, "%s is not a Linux program (ELF): %w", path, err)
	}
	if program.Type != elf.ET_EXEC && program.Type != elf.ET_DYN {
		return "", api.Errorf(api.Invalid, "%s is an ELF file of type %v, not a program", path, program.Type)
	}
	if program.OSABI != elf.ELFOSABI_NONE && program.OSABI != elf.ELFOSABI_LINUX {
		return "", api.Errorf(api.Invalid, "%s is built for %v: build it for Linux", path, program.OSABI)
	}
	for _, p := range program.Progs {
		if p.Type == elf.PT_INTERP {
			loader := make([]byte, min(p.Filesz, 256))
			if _, err := io.ReadFull(p.Open(), loader); err != nil {
				return "", api.Errorf(api.Invalid, "%s: its program header is broken: %w", path, err)
			}
			return "", api.Errorf(api.Invalid, "%s is dynamically linked (it needs %s), so it cannot run in an empty image: build it static, for Go with CGO_ENABLED=0",
				path, strings.TrimRight(string(loader), "\x00"))
		}
	}
	if needed, err := program.ImportedLibraries(); err == nil && len(needed) > 0 {
		return "", api.Errorf(api.Invalid, "%s is dynamically linked (it needs %s): build it static", path, strings.Join(needed, ", "))
	}
	arch := architecture(program)
	if arch == "" {
		return "", api.Errorf(api.Unsupported, "%s is built for %v, which no worker runs", path, program.Machine)
	}
	return "linux/" + arch, nil
}

// architecture is the name that images use for an ELF file's machine, empty for
// one that images have no name for.
func architecture(f *elf.File) string {
	little := f.ByteOrder.String() == "LittleEndian"
	switch {
	case f.Machine == elf.EM_X86_64 && f.Class == elf.ELFCLASS64:
		return "amd64"
	case f.Machine == elf.EM_AARCH64 && little:
		return "arm64"
	case f.Machine == elf.EM_386:
		return "386"
	case f.Machine == elf.EM_ARM && little:
		return "arm"
	case f.Machine == elf.EM_RISCV && f.Class == elf.ELFCLASS64:
		return "riscv64"
	case f.Machine == elf.EM_PPC64 && little:
		return "ppc64le"
	case f.Machine == elf.EM_S390 && f.Class == elf.ELFCLASS64:
		return "s390x"
	case f.Machine == elf.EM_LOONGARCH && f.Class == elf.ELFCLASS64:
		return "loong64"
	}
	return ""
}
