package repository_test

import (
	"regexp"
	"strings"
	"testing"
)

// TestDependenciesAreDecided compares go.mod with the table of dependencies: each direct one has its line there, with the
// version in use, and each line its dependency.
func TestDependenciesAreDecided(t *testing.T) {
	const table = "docs/decisions/0001-dependencies.md"
	required := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^(?:require )?\s*(\S+\.\S+/\S+) (v\S+)( // indirect)?$`).FindAllStringSubmatch(read(t, "go.mod"), -1) {
		if m[3] == "" {
			required[m[1]] = m[2]
		}
	}
	if len(required) == 0 {
		t.Fatal("found no requirement in go.mod")
	}
	decided := map[string]string{}
	for line := range strings.Lines(read(t, table)) {
		if m := regexp.MustCompile("^\\| `(\\S+)` \\| (v\\S+) \\|").FindStringSubmatch(line); m != nil {
			decided[m[1]] = m[2]
		}
	}
	for module, version := range required {
		if decided[module] != version {
			t.Errorf("go.mod requires %s %s; %s says %q", module, version, table, decided[module])
		}
	}
	for module := range decided {
		if required[module] == "" {
			t.Errorf("%s decides on %s, which go.mod does not require directly", table, module)
		}
	}
}
