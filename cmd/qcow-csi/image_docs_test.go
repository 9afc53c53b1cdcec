package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// asProgram in the environment makes the test binary the program.
const asProgram = "TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		os.Exit(run())
	}
	os.Exit(m.Run())
}

// documentation is the reference of the commands.
const documentation = "../../docs/image.md"

// TestImageDocumentationRuns runs every example of the documentation, in order, in one folder.
func TestImageDocumentationRuns(t *testing.T) {
	text := string(read(t, documentation))
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin, dir := t.TempDir(), t.TempDir()
	if err := os.Symlink(executable, filepath.Join(bin, "qcow-csi")); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, block := range regexp.MustCompile("(?ms)^```sh\n(.*?)^```").FindAllStringSubmatch(text, -1) {
		cmd := exec.CommandContext(t.Context(), "sh", "-eu", "-c", block[1])
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), asProgram+"=1", "PATH="+bin+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s%s", err, block[1], out)
		}
		ran += strings.Count(block[1], "qcow-csi image")
	}
	if ran < 30 {
		t.Errorf("only %d commands ran", ran)
	}
	for _, name := range names(t, dir) {
		if strings.HasSuffix(name, ".qcow2") {
			mustImage(t, "check", filepath.Join(dir, name))
		}
		if strings.HasPrefix(name, ".") {
			t.Errorf("%s was left behind", name)
		}
	}
}

// TestImageDocumentationIsComplete: every command has its section, and an example there.
func TestImageDocumentationIsComplete(t *testing.T) {
	text := string(read(t, documentation))
	var described []string
	for _, section := range strings.Split(text, "\n## ")[1:] {
		heading, body, _ := strings.Cut(section, "\n")
		for _, word := range strings.FieldsFunc(heading, func(r rune) bool { return r == ' ' || r == ',' }) {
			if strings.Contains(body, "qcow-csi image "+word+" ") {
				described = append(described, word)
			}
		}
	}
	for _, sub := range newImageCommand().Commands() {
		if !slices.Contains(described, sub.Name()) {
			t.Errorf("%s has no section with an example", sub.Name())
		}
	}
}
