// Package repository tests the repository itself: that its parts are where they belong, that the direction of imports
// holds, and that what the documents, the Makefile and the Dockerfile name exists.
package repository_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// root is the top of the repository, seen from this package's folder.
const root = "../.."

// topLevel is all that may stand at the top, besides files whose names begin with a dot.
var topLevel = []string{
	"go.mod", "go.sum", "Makefile", "Dockerfile", "README.md", "LICENSE",
	"cmd", "driver", "qcow", "nbdexport", "charts", "deploy", "test", "docs",
	"bin", // built, never committed
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") && !slices.Contains(topLevel, e.Name()) {
			t.Errorf("%s does not belong at the top of the repository", e.Name())
		}
	}
}

// TestSourceFiles holds the sources to their size, and to being finished.
func TestSourceFiles(t *testing.T) {
	const most = 600 // lines: a longer file holds two ideas
	unfinished := []string{"TO" + "DO", "FIX" + "ME", "XX" + "X"}
	for path, text := range files(t) {
		if strings.HasSuffix(path, ".go") && bytes.Count(text, []byte("\n")) > most {
			t.Errorf("%s has more than %d lines", path, most)
		}
		if path == "LICENSE" || path == "go.sum" {
			continue
		}
		for _, mark := range unfinished {
			if bytes.Contains(text, []byte(mark)) {
				t.Errorf("%s is unfinished: it says %s", path, mark)
			}
		}
	}
}

// files returns the text files of the repository by their path relative to the root.
func files(t *testing.T) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); name == ".git" || name == "bin" || name == "testdata" {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if bytes.IndexByte(text, 0) < 0 {
			found[strings.TrimPrefix(filepath.ToSlash(path), root+"/")] = text
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// read returns the text of a file given relative to the root.
func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
