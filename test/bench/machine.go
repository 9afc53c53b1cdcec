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
	Processor string `json:"processor"`
	CPUs      int    `json:"cpus"`
	MemoryMiB int    `json:"memory_mib"`
	Kernel    string `json:"kernel"`
	Go        string `json:"go"`
	Fio       string `json:"fio"`
	QEMU      string `json:"qemu"`
}

func describeMachine(ctx context.Context) machine {
	m := machine{
		Processor: field("/proc/cpuinfo", "model name"),
		CPUs:      runtime.NumCPU(),
		Go:        runtime.Version(),
		Fio:       firstLine(ctx, "fio", "--version"),
		QEMU:      firstLine(ctx, "qemu-nbd", "--version"),
	}
	if _, err := fmt.Sscan(field("/proc/meminfo", "MemTotal"), &m.MemoryMiB); err == nil {
		m.MemoryMiB >>= 10
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return m
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
