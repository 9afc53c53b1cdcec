package repository_test

import (
	"path"
	"strings"
	"testing"
)

// TestRequiredTestsExist checks the list of tests that continuous integration demands: a name that no test has would
// fail the run at its very end.
func TestRequiredTestsExist(t *testing.T) {
	tests := map[string]bool{} // "package test"
	for name, text := range files(t) {
		if !strings.HasSuffix(name, "_test.go") {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if f, ok := strings.CutPrefix(line, "func Test"); ok {
				f, _, _ = strings.Cut(f, "(")
				tests[path.Dir(name)+" Test"+f] = true
			}
		}
	}
	required := 0
	for line := range strings.Lines(read(t, ".ci/required")) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		required++
		if !tests[line] {
			t.Errorf(".ci/required demands %s, which does not exist", line)
		}
	}
	if required == 0 {
		t.Error(".ci/required demands nothing")
	}
}
