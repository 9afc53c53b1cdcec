package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// machine says where figures come from.
type machine struct {
	Processor string    `json:"processor"`
	CPUs      int       `json:"cpus"`
	MemoryMiB int       `json:"memory_mib"`
	Kernel    string    `json:"kernel"`
	Load      string    `json:"load"` // averages before the run: more than nothing means that others were at work
	Versions  []version `json:"versions"`
}

// version is what a program says of itself.
type version struct {
	Program string `json:"program"`
	Version string `json:"version"`
}

func describeMachine(ctx context.Context) machine {
	m := machine{Processor: field("/proc/cpuinfo", "model name"), CPUs: runtime.NumCPU(), Load: "unknown"}
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &m.MemoryMiB); err == nil {
		m.MemoryMiB >>= 10
	}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(text))[:3], " ")
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	m.Versions = []version{
		{"qcow-csi", firstLine(ctx, "git", "describe", "--tags", "--always", "--dirty")},
		{"Go", runtime.Version()},
	}
	for _, program := range []string{"qemu-nbd", "qemu-storage-daemon", "nbdkit", "nbdcopy", "fio"} {
		m.Versions = append(m.Versions, version{program, firstLine(ctx, program, "--version")})
	}
	return m
}

// availableMemory returns how many bytes can be taken without swapping.
func availableMemory() int64 {
	var kib int64
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemAvailable"), &kib); err != nil {
		return 0
	}
	return kib << 10
}

// field returns the value of the first line "name: value" in the file, or "unknown".
func field(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// firstLine returns the first line that a program prints, or "unknown".
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := output(ctx, name, args...)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}
