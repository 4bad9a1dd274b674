// SPDX-License-Identifier: Apache-2.0
module bucket

go 1.19
