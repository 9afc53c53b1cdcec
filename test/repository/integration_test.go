package repository_test

import (
	"path"
	"regexp"
	"strings"
	"testing"
)

// tests returns the tests and fuzz targets of the repository, by name and, but for those that run in a guest only, by
// "package name".
func tests(t *testing.T) map[string]bool {
	t.Helper()
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	found := map[string]bool{}
	for name, text := range files(t) {
		if strings.HasSuffix(name, "_test.go") {
			for _, m := range declared.FindAllSubmatch(text, -1) {
				found[string(m[1])] = true
				if !strings.HasPrefix(string(text), "//go:build vmguest\n") {
					found[path.Dir(name)+" "+string(m[1])] = true
				}
			}
		}
	}
	return found
}

// TestRequiredTestsExist checks the list of tests that continuous integration demands: a name that no test has would
// fail the run at its very end.
func TestRequiredTestsExist(t *testing.T) {
	exists := tests(t)
	required := 0
	for line := range strings.Lines(read(t, ".ci/required")) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		required++
		if !exists[line] {
			t.Errorf(".ci/required demands %s, which does not exist", line)
		}
	}
	if required == 0 {
		t.Error(".ci/required demands nothing")
	}
}

// TestDocumentedTestsExist checks that each test which a document names as the one for a rule is there.
func TestDocumentedTestsExist(t *testing.T) {
	exists := tests(t)
	named := regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w+)`")
	for name, text := range documents(t) {
		for _, m := range named.FindAllStringSubmatch(text, -1) {
			if !exists[m[1]] {
				t.Errorf("%s names %s, which does not exist", name, m[1])
			}
		}
	}
}
