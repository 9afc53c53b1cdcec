package main

import (
	"context"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const (
	// defaultRunDir is for what has to outlive a process, and is of no use once the machine was booted.
	defaultRunDir = "/run/qcow-csi"
	// noRunDir is the name of none.
	noRunDir = "none"
	// autoRunDir is the name of defaultRunDir for root, else of one in the user's own directory for such things, and of none where that fails.
	autoRunDir = "auto"
)

// openJournals returns the journals of images in a run directory, nil without one.
func openJournals(runDir string) (*storage.Journals, error) {
	if runDir == noRunDir {
		return nil, nil
	}
	return storage.OpenJournals(runDir)
}

// openJournal returns the journal of an image, nil without one.
func openJournal(ctx context.Context, runDir string, image *storage.OSFile) (qcow.Journal, error) {
	auto := runDir == autoRunDir
	if auto {
		runDir = defaultRunDir
		if own := os.Getenv("XDG_RUNTIME_DIR"); os.Geteuid() != 0 && own != "" {
			runDir = filepath.Join(own, "qcow-csi")
		}
	}
	journals, err := openJournals(runDir)
	if err != nil && auto {
		klog.FromContext(ctx).Info("no journal: writes to shared or backed clusters wait for the disk", "reason", err.Error())
		return nil, nil
	}
	if err != nil || journals == nil {
		return nil, err
	}
	journal, err := journals.Open(image)
	if err != nil {
		return nil, err
	}
	return journal, nil
}
