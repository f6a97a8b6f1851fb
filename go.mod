module github.com/mpathd/mpathd

go 1.26
