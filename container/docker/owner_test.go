package docker

import (
	"os"
	"syscall"
)

func owner(info os.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }
