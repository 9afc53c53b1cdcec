// Package recording watches how a program that is not ours changes its files, and tells it in the words of
// [storage.Recorder]: as a list of [storage.Op].
//
// A small library is preloaded into the program and logs each call that writes, punches, truncates or syncs one of the
// files to be watched, with its data, under one lock. Why this and not strace: strace tells of calls of several threads as they
// enter and leave, so that their order must be guessed, prints data as text, and needs ptrace, which containers often refuse.
// QEMU's block layer does its I/O to files by the calls of the C library, in threads, unless io_uring or native AIO are asked
// for by name. Whatever a program does past the library does not stay unseen: see [Replay].
package recording

import (
	"context"
	_ "embed" // of the source below
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed preload/shim.c
var source []byte

// Shim is the compiled library.
type Shim struct{ path string }

// Build compiles the library into dir. It needs gcc and the C library's headers.
func Build(ctx context.Context, dir string) (*Shim, error) {
	code, library := filepath.Join(dir, "shim.c"), filepath.Join(dir, "shim.so")
	if err := os.WriteFile(code, source, 0o600); err != nil {
		return nil, err
	}
	if strings.ContainsAny(library, " :") {
		return nil, fmt.Errorf("recording: LD_PRELOAD can't name %q", library)
	}
	// Some compilers fortify by default, which defines the functions that the library replaces.
	cmd := exec.CommandContext(ctx, "gcc", "-shared", "-fPIC", "-O2", "-Wall", "-U_FORTIFY_SOURCE",
		"-o", library, code, "-ldl", "-lpthread")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, out)
	}
	return &Shim{path: library}, nil
}

// Watch prepares cmd, which has not been started, so that it logs what it does to the files. They exist already. The log
// is a new file at path.
func (s *Shim) Watch(cmd *exec.Cmd, path string, files ...string) (*Log, error) {
	if strings.Contains(strings.Join(files, ""), "\n") {
		return nil, errors.New("recording: newline in a file name")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd.Env = append(cmd.Environ(),
		"LD_PRELOAD="+s.path,
		"RECORDING_LOG="+path,
		"RECORDING_FILES="+strings.Join(files, "\n"))
	return &Log{file: f, files: len(files)}, nil
}
