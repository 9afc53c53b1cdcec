package main

import (
	"fmt"
	"os"
	"strings"
)

// The section of a document that is made of a report stands between these lines.
const (
	sectionBegin = "<!-- begin: written by go run ./test/bench -markdown -->\n"
	sectionEnd   = "<!-- end: written by go run ./test/bench -markdown -->\n"
)

// markdown returns the report as a section of a document.
func (r *report) markdown() string {
	var b strings.Builder
	for _, line := range r.introduction() {
		b.WriteString("- " + line + "\n")
	}
	for _, t := range r.tables() {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", t.title, t.text)
		for i, row := range t.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
			if i == 0 {
				b.WriteString("|" + strings.Repeat(" --- |", t.left) + strings.Repeat(" ---: |", len(row)-t.left) + "\n")
			}
		}
	}
	b.WriteString("\n### Command lines\n\n```text\n" + strings.Join(r.commands(), "\n") + "\n```\n")
	return b.String()
}

// replaceSection puts a text into the marked section of a document.
func replaceSection(document, text string) (string, error) {
	before, rest, ok := strings.Cut(document, sectionBegin)
	_, after, ended := strings.Cut(rest, sectionEnd)
	if !ok || !ended {
		return "", fmt.Errorf("there is no section between %q and %q", strings.TrimSpace(sectionBegin), strings.TrimSpace(sectionEnd))
	}
	return before + sectionBegin + "\n" + text + "\n" + sectionEnd + after, nil
}

// writeMarkdown puts the report into the marked section of a file.
func (r *report) writeMarkdown(path string) error {
	document, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := replaceSection(string(document), r.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return os.WriteFile(path, []byte(text), 0o644)
}
