package main

import (
	"fmt"
	"os"
	"strings"
)

// memory is what a process takes, in KiB.
type memory struct {
	RSS  int64 `json:"rss"`
	Anon int64 `json:"anon"` // the part of RSS that is no page cache
	Peak int64 `json:"peak"` // the most RSS ever
}

// memoryOf asks the kernel about a process.
func memoryOf(pid int) (memory, error) {
	path := fmt.Sprintf("/proc/%d/status", pid)
	text, err := os.ReadFile(path)
	if err != nil {
		return memory{}, err
	}
	var m memory
	fields := map[string]*int64{"VmRSS": &m.RSS, "RssAnon": &m.Anon, "VmHWM": &m.Peak}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if field := fields[name]; field != nil {
			if _, err := fmt.Sscanf(value, "%d kB", field); err != nil {
				return memory{}, fmt.Errorf("%s: %q: %w", path, line, err)
			}
		}
	}
	return m, nil
}
