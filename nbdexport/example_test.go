package nbdexport_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// A new image, served on a unix socket until the program is told to end.
func Example() {
	dir, err := os.MkdirTemp("", "nbdexport")
	if err != nil {
		panic(err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			panic(err)
		}
	}()

	file, err := storage.Create(filepath.Join(dir, "disk.qcow2"))
	if err != nil {
		panic(err)
	}
	if err := qcow.Create(file, qcow.CreateOptions{Size: 10 << 30}); err != nil {
		panic(err)
	}
	img, err := qcow.Open(file, qcow.Options{})
	if err != nil {
		panic(err)
	}

	server, err := nbdexport.NewServer(nbdexport.Config{
		Exports: []nbdexport.Export{{Name: "disk", Description: "an example", Backend: nbdexport.NewImageBackend(img, nbdexport.ImageOptions{})}},
	})
	if err != nil {
		panic(err)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "nbd.sock"))
	if err != nil {
		panic(err)
	}
	served := make(chan error)
	go func() { served <- server.Serve(context.Background(), listener) }()

	// Clients come and go. In the end:
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println("shutdown:", server.Shutdown(ctx))
	fmt.Println("serve:", <-served)
	fmt.Println("close:", img.Close())
	// Output:
	// shutdown: <nil>
	// serve: <nil>
	// close: <nil>
}
